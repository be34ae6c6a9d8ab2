"""Why a value of a plan is treated as it is, and what the other ways would cost; and in what two plans differ.

Each alternative is this one value's alone, all other decisions as they are: the peak is read off the timeline with the value
taken out while it is idle, or put in, and recompute counts its own op.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from remat.budget import format_bytes
from remat.errors import RematError
from remat.plan import Activation, Plan
from remat.program import Decision

_FIGURES = ("budget_bytes", "peak_bytes", "resident_bytes", "saved_bytes", "host_bytes", "recompute_us", "stall_us", "step_us")


@dataclass(frozen=True)
class Alternative:
    """What one decision for one value comes to: the step's peak, and the time it adds. `note` says what that leaves out."""

    decision: Decision
    is_chosen: bool
    peak_bytes: int
    added_us: float
    note: str


@dataclass(frozen=True)
class Explanation:
    """A value, and its alternatives. `budget_bytes` is None where there was none."""

    activation: Activation
    alternatives: tuple[Alternative, ...]
    budget_bytes: int | None

    def __str__(self) -> str:
        a = self.activation
        lines = [
            f"{a.name}: {a.decision.value}, since: {a.reason}",
            f"{a.op} of {a.module or 'the model'}, {a.source}".rstrip(", "),
        ]
        lines.append(
            f"{'×'.join(map(str, a.shape))} {a.dtype}, {format_bytes(a.bytes)}, made from {', '.join(a.reads) or 'inputs'}"
        )
        for other in self.alternatives:
            over = self.budget_bytes is not None and other.peak_bytes > self.budget_bytes
            text = f"{'chosen' if other.is_chosen else '':6}  {other.decision.value:9}  peak {format_bytes(other.peak_bytes)}"
            text += f", {other.added_us / 1e3:+.3f} ms" + (", over the budget" if over else "")
            lines.append(text + (f" ({other.note})" if other.note else ""))
        return "\n".join(lines)


def explain_value(plan: Plan, name: str) -> Explanation:
    """Why `name` is treated as it is, and each way in which it can be. What can only be saved has one: that one.

    Raises RematError for a name that is not in the plan, with close ones.
    """
    found = {a.name: a for block in plan.blocks for a in block.activations}
    if name not in found:
        close = difflib.get_close_matches(name, found, n=5)
        raise RematError(f"the plan has no value {name!r}" + (f"; there are {', '.join(close)}" if close else ""))
    activation = found[name]
    decision, idle = activation.decision, range(*activation.idle)
    live = [moment.live_bytes for moment in plan.timeline]
    change = -activation.bytes if decision is Decision.SAVE else activation.bytes
    turned = plan.peak_bytes - max(live) + max(size + change * (i in idle) for i, size in enumerate(live))
    costs = {Decision.SAVE: 0.0, Decision.RECOMPUTE: activation.cost_us}
    missing = [read for read in activation.reads if read in found and found[read].decision is Decision.RECOMPUTE]
    notes = {Decision.RECOMPUTE: f"besides what recomputing {', '.join(missing)} takes"} if missing else {}
    if plan.link is not None:
        costs[Decision.OFFLOAD] = plan.link.out_us(activation.bytes) + plan.link.in_us(activation.bytes)
        notes[Decision.OFFLOAD] = "both copies, if nothing hides them"
    options = []
    for way, cost in costs.items():
        if way not in activation.ways:
            continue
        is_like_now = (way is Decision.SAVE) == (decision is Decision.SAVE)
        peak = plan.peak_bytes if is_like_now else turned
        options.append(Alternative(way, way is decision, peak, cost - costs.get(decision, 0.0), notes.get(way, "")))
    return Explanation(activation, tuple(options), plan.budget_bytes)


@dataclass(frozen=True)
class Difference:
    """Two plans: figures of both by name, and the values that they treat differently, with both decisions."""

    figures: Mapping[str, tuple[float | None, float | None]]
    decisions: Mapping[str, tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.decisions) or any(ours != theirs for ours, theirs in self.figures.values())


def diff(a: Plan, b: Plan) -> Difference:
    """In what two plans differ. "not read" stands where backward reads the value in one plan only."""
    figures = {name: (getattr(a, name), getattr(b, name)) for name in _FIGURES}
    ours, theirs = ({name: d.value for name, d in plan.decisions.items()} for plan in (a, b))
    names = dict.fromkeys((*ours, *theirs))
    pairs = {name: (ours.get(name, "not read"), theirs.get(name, "not read")) for name in names}
    return Difference(figures, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
