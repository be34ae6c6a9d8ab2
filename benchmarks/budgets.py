"""Every model of the tests at eight budgets, from 95% of its unconstrained peak down to the smallest feasible: what was
predicted and what was measured, through door 1 and through door 2 with its graphs run eagerly or by Inductor.

`python benchmarks/budgets.py optimize`, `eager` or `inductor`, and names of models to run only those.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import remat

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "budgets.json"
DOORS = ("optimize", "eager", "inductor")
BUDGETS = 8

sys.path.insert(0, str(ROOT))

from tests.models import MODELS, build  # noqa: E402  once the repository is on the path
from tests.steps import run_step  # noqa: E402


@dataclass(frozen=True)
class Row:
    model: str
    door: str
    budget_bytes: int | None
    predicted_bytes: int
    measured_bytes: int


def main() -> None:
    door, *names = sys.argv[1:] or [DOORS[0]]
    rows = [row for name in track(names or list(MODELS), door) for row in sweep(name, door)]
    table = Table("model", "budgets", "largest measured / budget", "predicted / measured", "peaks shrink with budgets")
    for name in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == name and row.budget_bytes is not None]
        ratios = [row.predicted_bytes / row.measured_bytes for row in mine]
        peaks = [row.measured_bytes for row in mine]
        table.add_row(
            name,
            str(len(mine)),
            f"{max(row.measured_bytes / (row.budget_bytes or 1) for row in mine):.4f}",
            f"{min(ratios):.4f} to {max(ratios):.4f}",
            "yes" if peaks == sorted(peaks, reverse=True) else "no",
        )
    Console().print(table)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    fresh = {(row.model, row.door) for row in rows}
    kept = [row for row in kept if (row["model"], row["door"]) not in fresh]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept + [asdict(row) for row in rows], indent=1) + "\n")


def sweep(name: str, door: str) -> Iterator[Row]:
    """The unconstrained step, then eight budgets from large to small."""
    unconstrained = run(name, door, None)
    yield unconstrained
    largest, smallest = 0.95 * unconstrained.measured_bytes, smallest_budget(name, door)
    for k in range(BUDGETS):
        yield run(name, door, int(largest - (largest - smallest) * k / (BUDGETS - 1)) if smallest < largest else smallest)


def run(name: str, door: str, budget: int | None) -> Row:
    model, kwargs = build(name)
    module = through(door, model, kwargs, budget)
    measured = run_step(module, kwargs).peak_bytes
    plan = module.plan if door == "optimize" else remat.plans(module)[0].plan
    return Row(name, door, budget, plan.peak_bytes, measured)


def smallest_budget(name: str, door: str) -> int:
    model, kwargs = build(name)
    try:
        through(door, model, kwargs, 1)(**kwargs)
    except remat.BudgetError as error:
        return error.minimum_bytes
    raise AssertionError("a budget of one byte was met")


def through(door: str, model: Any, kwargs: dict[str, Any], budget: int | None) -> Any:
    if door == "optimize":
        return remat.optimize(model, (), kwargs, budget=budget)
    torch._dynamo.reset()
    return torch.compile(model, backend="remat", options={"budget": budget, "compiler": door})


if __name__ == "__main__":
    main()
