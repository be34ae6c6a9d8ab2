"""A plan as one page of HTML that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remat.budget import format_bytes
from remat.plan import Activation, Plan
from remat.views import charts

COLUMNS = ("value", "module", "bytes", "decision", "reason", "us", "shape", "dtype", "op", "source")
_HERE = Path(__file__).parent


def to_html(plan: Plan, frontier: Sequence[Plan] = ()) -> str:
    """The page. frontier: plans to show the chosen one among, as `remat.frontier` returns them."""
    from jinja2 import Environment  # comes with Altair

    drawn = {
        "timeline": charts.timeline(plan),
        "before": charts.timeline(plan, before=True),
        "blocks": charts.blocks(plan),
        "lanes": charts.lanes(plan),
        **({"frontier": charts.frontier(frontier, plan)} if frontier else {}),
    }
    data = {
        "charts": {name: chart.to_dict() for name, chart in drawn.items()},
        "columns": COLUMNS,
        "rows": [_row(activation) for block in plan.blocks for activation in block.activations],
    }
    template = Environment(autoescape=True).from_string((_HERE / "page.html").read_text())
    return template.render(
        title=f"{plan.model or 'A training step'}: {format_bytes(plan.peak_bytes)} at its peak",
        plan=plan,
        figures=figures(plan),
        at_peak=[(kind, format_bytes(size), size / plan.peak_bytes) for kind, size in plan.at_peak().items()],
        modules=[block.module or block.name for block in plan.blocks],
        has_frontier=bool(frontier),
        style=(_HERE / "page.css").read_text(),
        code=(_HERE / "page.js").read_text(),
        library=charts.script(),
        data=json.dumps(data).replace("<", "\\u003c"),
    )


def figures(plan: Plan) -> list[tuple[str, str, str]]:
    """The headline: name, figure, and what to compare it with."""
    step = plan.baseline_step_us or 1.0
    budget = "no budget" if plan.budget_bytes is None else f"budget {format_bytes(plan.budget_bytes)}"
    found = [
        ("peak", format_bytes(plan.peak_bytes), f"{format_bytes(plan.baseline_peak_bytes)} with everything saved; {budget}"),
        ("step, predicted", f"{plan.step_us / 1e3:.1f} ms", f"{plan.step_us / step - 1:+.1%}"),
        ("saved for backward", format_bytes(plan.saved_bytes), f"of {_all_activations(plan)} that backward reads"),
        ("recompute", f"{plan.recompute_us / 1e3:.1f} ms", f"{plan.recompute_us / step:.1%} of the step"),
    ]
    if plan.host_bytes:
        waits = f"{plan.stall_us / step:.1%} of the step waits for copies"
        found.append(("on the host meanwhile", format_bytes(plan.host_bytes), waits))
    return found


def _all_activations(plan: Plan) -> str:
    return format_bytes(sum(a.bytes for a in itertools.chain.from_iterable(block.activations for block in plan.blocks)))


def _row(activation: Activation) -> list[Any]:
    return [
        activation.name,
        activation.module,
        activation.bytes,
        activation.decision.value,
        activation.reason,
        round(activation.cost_us, 2),
        "×".join(map(str, activation.shape)),
        activation.dtype,
        activation.op,
        activation.source,
    ]
