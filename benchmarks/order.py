"""Do predicted step times put plans in the right order? Plans of one model and door, from fastest to smallest, all in turn.

Each plan is a process of its own, as in `frontier.py`; in a round each takes two steps, and the second counts: a process that
has waited is slow at first, most where its plan takes most memory. Spearman's rank correlation is between predicted times and
medians of CPU seconds, relative to their round's; plans that are predicted to be equal count once.

    python benchmarks/order.py [MODEL ...] [--door remat|remat-compiled] [--plans 8] [--rounds 9]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from frontier import Point, Worker
from models import MODELS
from rich.console import Console
from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results" / "order.json"
PLAIN = {"remat": "eager", "remat-compiled": "compile"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--door", choices=PLAIN, default="remat")
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    console = Console()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.models or MODELS:
        points = measured(model, options.door, options.plans, options.rounds)
        times = np.array([point.times for point in points])
        relative = np.median(times / np.median(times, axis=0), axis=1)
        rank = spearmanr([p.predicted_us for p in points], relative).statistic
        console.print(f"{model}, {options.door}: {len(points)} plans, Spearman {rank:.3f}")
        found[f"{model}/{options.door}"] = {"spearman": round(float(rank), 3), "plans": list(map(_row, points, relative))}
        RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def measured(model: str, door: str, plans: int, rounds: int) -> list[Point]:
    """Distinct plans at budgets from the smallest peak to the plain step's, with their times."""
    with contextlib.ExitStack() as stack:
        smallest, smallest_point = _started(model, f"{door}/smallest", stack)
        _, plain = _started(model, PLAIN[door], stack)
        kept = {smallest_point.predicted_us: (smallest, smallest_point)}
        for budget in np.linspace(smallest_point.peak_bytes, plain.peak_bytes, plans)[1:]:
            worker, point = _started(model, f"{door}/{int(budget)}", stack)
            kept[point.predicted_us] = worker, point
        for _ in range(rounds):
            for worker, point in kept.values():
                worker.step()
                point.times.append(worker.step())
        return [point for _, point in kept.values()]


def _started(model: str, name: str, stack: contextlib.ExitStack) -> tuple[Worker, Point]:
    worker = Worker(model, name)
    stack.callback(worker.close)
    point = worker.ready().point
    if point is None:
        raise SystemExit(f"{model}, {name}: {worker.error}")
    return worker, point


def _row(point: Point, relative: float) -> dict[str, Any]:
    times = sorted(point.times)
    return {
        "peak_bytes": point.peak_bytes,
        "predicted_us": point.predicted_us,
        "relative": round(float(relative), 4),
        "median_s": statistics.median(times),
        "least_s": times[0],
        "most_s": times[-1],
    }


if __name__ == "__main__":
    main()
