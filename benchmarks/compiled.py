"""Door 2 with Inductor against torch's own ratio budget (`activation_memory_budget`), on whole models.

Speed: remat gets, as its budget in bytes, the peak that a ratio measures at; both steps are then timed in turn, as in
`speed.py`. Reach: the lowest peak that any of the ratios measures at, and the smallest that remat reaches. Peaks are of
`remat.measure` on a warm step, above the parameters, gradients included.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed import Batch, compare, gpt2, llama, peak_of, show, tokens
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

import remat

RESULTS = Path(__file__).parent / "results" / "compiled.json"
RATIOS = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
TIMED = (0.6, 0.3)


@dataclass(frozen=True)
class Reach:
    model: str
    ratio_peaks: dict[str, int]
    smallest_bytes: int
    share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 100  # every variant is compiled from the same code
    rows, reaches = [], []
    for name, model, batch in (
        ("GPT-2 12 x 256, 8 x 256 tokens", gpt2(256), tokens(8, 256)),
        ("Llama 8 x 256, 8 x 256 tokens", llama(256, layers=8), tokens(8, 256)),
    ):
        ratios = {ratio: with_ratio(model, ratio) for ratio in RATIOS}
        peaks = {ratio: peak_of(compiled, batch) for ratio, compiled in ratios.items()}
        variants: dict[str, Any] = {}
        for ratio in TIMED:
            variants[f"ratio {ratio}"] = (ratios[ratio], None)
            variants[f"remat at the peak of {ratio}"] = (within(model, peaks[ratio]), peaks[ratio])
        for ratio in TIMED:
            pair = {k: v for k, v in variants.items() if k.endswith(str(ratio))}
            rows += compare(f"{name}, {ratio}", pair, batch, rounds)
        resident = sum(p.nbytes for p in model.parameters())
        smallest = peak_of(within(model, smallest_budget(model, batch)), batch) - resident
        above = {str(ratio): peak - resident for ratio, peak in peaks.items()}
        reaches.append(Reach(name, above, smallest, smallest / min(above.values())))
    show(rows)
    show_reach(reaches)
    data = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds}
    tables = {"speed": [asdict(row) for row in rows], "reach": [asdict(reach) for reach in reaches]}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**data, **tables}, indent=1) + "\n")


def with_ratio(model: Any, ratio: float) -> Any:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:  # one of its own: Dynamo keeps the code of each apart
        with functorch_config.patch(activation_memory_budget=ratio):
            return compile_fx(gm, inputs)

    return torch.compile(model, backend=backend)


def within(model: Any, budget: int) -> Any:
    return torch.compile(model, backend="remat", options={"budget": budget})


def smallest_budget(model: Any, batch: Batch) -> int:
    try:
        within(model, sum(p.nbytes for p in model.parameters()) * 2)(**batch)
    except remat.BudgetError as error:
        return error.minimum_bytes
    raise AssertionError("parameters and gradients alone fill this budget")


def show_reach(reaches: list[Reach]) -> None:
    table = Table("model", *(f"ratio {ratio}" for ratio in RATIOS), "remat's smallest", "share of the lowest")
    for reach in reaches:
        peaks = (f"{peak / 2**20:.0f}" for peak in reach.ratio_peaks.values())
        table.add_row(reach.model, *peaks, f"{reach.smallest_bytes / 2**20:.0f}", f"{reach.share:.2f}")
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    console.print("peaks in MiB above the parameters")


if __name__ == "__main__":
    main()
