"""How long door 2 takes to compile, beside plain `torch.compile`: from cold caches, each in a process of its own.

Budgets are shares of what the plain compiled step peaks at; torch's own ratio budgets stand beside them. Seconds are CPU time
up to the end of the first step, the C++ compiler's too; Inductor's workers are off, so that nothing is left out. The plain step
is compiled anew beside each, at the same time, so that a busy machine slows both. Kernels are those that the C++ compiler was
run for.

    python benchmarks/compile_time.py [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from models import MODELS, build
from peers import prepare
from rich.console import Console
from rich.table import Table

import remat

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
SHARES = (1.2, 0.75, 0.5, 0.35)
RATIOS = (0.8, 0.5, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama", "bert"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(first_step(*options.worker)))
        return
    rows = []
    table = Table("model", "budget", "peak, of plain", "CPU s", "of plain", "kernels, plain", "plans compiled")
    for model in options.models:
        peak_bytes = run(model, "compile")["peak_bytes"]
        budgets = {f"remat, {share:.0%}": f"remat-compiled/{int(share * peak_bytes)}" for share in SHARES}
        for what, name in {**budgets, **{f"torch's ratio {ratio}": f"ratio/{ratio}/dp" for ratio in RATIOS}}.items():
            with ThreadPoolExecutor(2) as pool:
                plain, found = pool.map(run, (model, model), ("compile", name))
            rows.append({"model": model, "name": name, "plain": plain, **found})
            peak = f"{found['peak_bytes'] / plain['peak_bytes']:.0%}"
            spent = f"{found['cpu_s']:.1f}", f"{found['cpu_s'] / plain['cpu_s']:.2f}", f"{found['kernels']}, {plain['kernels']}"
            table.add_row(model, what, peak, *spent, str(found["plans"]))
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def run(model: str, name: str) -> dict[str, Any]:
    """What a new process with empty caches measures."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", model, name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_step(model: str, name: str) -> dict[str, Any]:
    """CPU seconds of the first step, how often Inductor compiled a backward, kernels, and the peak of a later step in bytes."""
    torch.set_num_threads(1)
    built = build(model)
    _, loss = prepare(name, built)
    before = _cpu_seconds()
    loss().backward()
    seconds = _cpu_seconds() - before
    built[0].zero_grad()
    plans = torch._dynamo.utils.counters["aot_autograd"]["total"]
    kernels = sum(1 for _ in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so"))
    peak = remat.measure(lambda: loss().backward()).peak_bytes
    return {"cpu_s": seconds, "plans": plans, "kernels": kernels, "peak_bytes": peak}


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
