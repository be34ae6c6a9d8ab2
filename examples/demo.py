"""Train a byte-level Llama on the source files of Python's standard library, plain and within a byte budget.

Five runs from the same weights on the same batches: the plain model, remat's door 1 (`remat.optimize`) and door 2 with
its graphs run eagerly; then `torch.compile` alone and door 2 with Inductor. Exits with 1 if a measured peak is above
its budget or a loss curve leaves its baseline's. Peaks are of forward and backward, with parameters, gradients and
inputs. AdamW's state, twice the parameters, comes on top of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import remat

BATCH, LENGTH = 8, 256
BUDGET = 0.4  # of the unoptimized step's activation memory
TOLERANCE = 1e-4  # between loss curves: compilers round differently, and Adam makes the difference grow

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A way to train. `prepare` returns what to call in place of the model, `plan_of` the plan behind that."""

    name: str
    baseline: str
    prepare: Callable[[LlamaForCausalLM, Batch], Any]
    plan_of: Callable[[Any], remat.Plan | None]


@dataclass(frozen=True)
class Result:
    losses: list[float]
    step_s: float
    peak_bytes: int
    plan: remat.Plan | None


def through_door_1(model: LlamaForCausalLM, batch: Batch) -> Any:
    return remat.optimize(model, (), batch, budget=BUDGET)


def through_door_2(compiler: str) -> Callable[[LlamaForCausalLM, Batch], Any]:
    options: dict[str, Any] = {"budget": BUDGET, "compiler": compiler}
    return lambda model, _: torch.compile(model, backend="remat", options=options)


def compiled_plan(compiled: Any) -> remat.Plan:
    return remat.plans(compiled)[0].plan


RUNS = [
    Run("plain", "plain", lambda model, _: model, lambda _: None),
    Run("door 1", "plain", through_door_1, lambda module: module.plan),
    Run("door 2, eager", "plain", through_door_2("eager"), compiled_plan),
    Run("torch.compile", "torch.compile", lambda model, _: torch.compile(model), lambda _: None),
    Run("door 2, Inductor", "torch.compile", through_door_2("inductor"), compiled_plan),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps of each run (20)")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="only the first so many runs")
    options = parser.parse_args()
    runs = RUNS[: options.runs]
    torch.manual_seed(0)
    weights = new_model().state_dict()
    batches = read_batches(options.steps)
    bar = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    results: dict[str, Result] = {}
    with Progress(*bar, TimeElapsedColumn()) as progress:
        for run in runs:
            task = progress.add_task(run.name, total=options.steps, loss="capture, compile")

            def show(loss: float, task: TaskID = task) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.3f}")

            results[run.name] = train(run, weights, batches, show)
    return report(runs, results)


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def read_batches(steps: int) -> list[Batch]:
    """Random windows of the standard library's source text, a byte a token."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"\n".join(file.read_bytes() for file in files)))
    starts = torch.randint(len(text) - LENGTH, (steps, BATCH))
    windows = text[starts.unsqueeze(-1) + torch.arange(LENGTH)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in windows]


def train(run: Run, weights: dict[str, Any], batches: list[Batch], show: Callable[[float], None]) -> Result:
    """Train for one pass over `batches`, then measure one more forward and backward."""
    torch.compiler.reset()
    model = new_model()
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = run.prepare(model, batches[0])
    losses, times = [], []
    for batch in batches:
        start = time.perf_counter()
        loss = step(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
        show(losses[-1])
    measured = remat.measure(lambda: step(**batches[0]).loss.backward())
    return Result(losses, statistics.median(times), measured.peak_bytes, run.plan_of(step))


def report(runs: list[Run], results: dict[str, Result]) -> int:
    """Print the table; 1 if a budget or a loss curve was missed."""
    table = Table("run", "budget", "predicted", "measured", "step", "first loss", "last loss", "loss curve", "")
    failed = False
    for run in runs:
        result, baseline = results[run.name], results[run.baseline]
        plan = result.plan
        apart = max(abs(a - b) for a, b in zip(result.losses, baseline.losses, strict=True))
        over = plan is not None and plan.budget_bytes is not None and result.peak_bytes > plan.budget_bytes
        wrong = [*["over budget"] * over, *["another curve"] * (not apart <= TOLERANCE)]
        failed |= bool(wrong)
        curve = f"{run.baseline}'s, bitwise" if apart == 0 else f"{run.baseline}'s, ± {apart:.0e}"
        table.add_row(
            run.name,
            mib(plan.budget_bytes if plan else None),
            mib(plan.peak_bytes if plan else None),
            mib(result.peak_bytes),
            f"{result.step_s * 1e3:.0f} ms",
            f"{result.losses[0]:.4f}",
            f"{result.losses[-1]:.4f}",
            "" if run.name == run.baseline else curve,
            ", ".join(wrong) if plan is None or wrong else "ok",
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    console.print("Predicted and measured are peaks, parameters and gradients included; step is the median wall time.")
    return int(failed)


def mib(amount: int | None) -> str:
    return "" if amount is None else f"{amount / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
