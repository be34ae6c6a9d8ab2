"""`remat.fit` held against what runs: the batch it names trains within the budget, and the next one up is refused.

The budget is two and a half times the smallest peak of the example batch. Peaks measured are of a warm step.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import remat
from remat.shapes import named_axes, resized

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fit.json"
MODELS = ("llama", "gpt2", "bert", "vit", "qwen3", "t5", "mixtral", "lora", "resnet", "convnext")

sys.path.insert(0, str(ROOT))

from tests.models import build  # noqa: E402  once the repository is on the path


@dataclass(frozen=True)
class Row:
    """What `fit` said, and what happened. `next_needs_bytes`: of the next batch up, by the error that refused it."""

    model: str
    budget_bytes: int
    batch: int
    predicted_bytes: int
    measured_bytes: int
    next_needs_bytes: int | None
    seconds: float


def main() -> None:
    rows = [check(name) for name in sys.argv[1:] or MODELS]
    table = Table("model", "budget MiB", "batch", "predicted MiB", "measured MiB", "next batch needs MiB", "fit() s")
    for row in rows:
        needs = f"{row.next_needs_bytes / 2**20:.2f}" if row.next_needs_bytes else "MISSED: it fits"
        sizes = (row.predicted_bytes, row.measured_bytes)
        cells = [f"{row.budget_bytes / 2**20:.2f}", str(row.batch), *(f"{size / 2**20:.2f}" for size in sizes)]
        table.add_row(row.model, *cells, needs, f"{row.seconds:.1f}")
    Console(width=120).print(table)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def check(name: str) -> Row:
    model, kwargs = build(name)
    budget = least_bytes(model, kwargs) * 5 // 2
    start = time.perf_counter()
    found = remat.fit(model, (), kwargs, budget=budget)
    seconds = time.perf_counter() - start
    axes = named_axes(model, (), kwargs)
    _, batch = resized((), kwargs, axes, {"batch": found.size})
    module = remat.optimize(model, (), batch, budget=budget)

    def step() -> None:
        output = module(**batch)  # held while backward runs, as training loops do and plans count it
        output.loss.backward()

    step()
    model.zero_grad()
    measured = remat.measure(step).peak_bytes
    model.zero_grad()
    needs = least_bytes(model, resized((), kwargs, axes, {"batch": found.size + 1})[1])
    needs = needs if needs > budget else None
    return Row(name, budget, found.size, found.plan.peak_bytes, measured, needs, seconds)


def least_bytes(model: Any, kwargs: dict[str, Any]) -> int:
    """The smallest budget that is not refused."""
    try:
        remat.plan(model, (), kwargs, budget=1)
    except remat.BudgetError as error:
        return error.minimum_bytes or 0
    raise AssertionError("a budget of one byte was met")


if __name__ == "__main__":
    main()
