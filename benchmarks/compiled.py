"""Door 2 with Inductor against torch's own ratio budget (`activation_memory_budget`) at equal peaks.

remat gets, as its budget in bytes, the peak that a ratio measures at; both steps are then timed in turn, as in `speed.py`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from speed import compare, gpt2, llama, peak_of, show, tokens
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

RESULTS = Path(__file__).parent / "results" / "compiled.json"
RATIOS = (0.6, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 100  # every variant is compiled from the same code
    rows = []
    for name, model, batch in (
        ("GPT-2 12 x 256, 8 x 256 tokens", gpt2(256), tokens(8, 256)),
        ("Llama 8 x 256, 8 x 256 tokens", llama(256, layers=8), tokens(8, 256)),
    ):
        for ratio in RATIOS:
            theirs = with_ratio(model, ratio)
            peak = peak_of(theirs, batch)
            ours = within(model, peak)
            rows += compare(name, {f"ratio {ratio}": (theirs, None), "remat at its peak": (ours, peak)}, batch, rounds)
    show(rows)
    data = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**data, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def with_ratio(model: Any, ratio: float) -> Any:
    """Compiled with Inductor under torch's ratio budget, for the whole model."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:  # one of its own: Dynamo keeps the code of each apart
        with functorch_config.patch(activation_memory_budget=ratio):
            return compile_fx(gm, inputs)

    return torch.compile(model, backend=backend)


def within(model: Any, budget: int) -> Any:
    """Compiled with Inductor and remat's budget."""
    return torch.compile(model, backend="remat", options={"budget": budget})


if __name__ == "__main__":
    main()
