"""The inverse question: the largest batch or the longest sequence that a budget has room for, found by planning.

No step runs and nothing runs out of memory: each size that is tried is captured and planned, as `remat.plan` does. The smallest
peak grows almost linearly with a size, so that a few steps of regula falsi find the last one that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from remat.budget import BudgetLike, format_bytes, parse_budget, resolve_budget
from remat.errors import CaptureError, RematError
from remat.pins import Pins
from remat.plan import Plan
from remat.policies import Policy
from remat.settings import Settings
from remat.shapes import named_axes, resized, size_of
from remat.whole import TracedModel, trace

_DOUBLINGS = 24


@dataclass(frozen=True)
class Fit:
    """The largest size that fits.

    plan: the fastest plan at that size, and so what a step costs there. next_size, next_bytes: the next size up and the least
    that it needs; None where the model does not take it, for the reason in `limit`. tried: the least bytes by size.
    """

    dim: str
    size: int
    budget_bytes: int
    plan: Plan
    next_size: int
    next_bytes: int | None
    limit: str
    tried: dict[int, int]

    def __str__(self) -> str:
        needs = f"{self.next_size} needs {format_bytes(self.next_bytes)}" if self.next_bytes is not None else self.limit
        peak, again = format_bytes(self.plan.peak_bytes), self.plan.recompute_us / self.plan.baseline_step_us
        step = f"{self.plan.step_us / 1e3:.1f} ms a step, {again:.1%} more for recompute"
        return f"{self.dim} {self.size} fits in {format_bytes(self.budget_bytes)}: {peak} at its peak, {step}; {needs}"


def fit(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike,
    dim: str = "batch",
    dynamic_shapes: Any = None,
    multiple_of: int = 1,
    policy: Policy = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    trainable_only: bool = True,
    host_budget: int | str | None = None,
    pin: Pins = None,
    costs: str = "analytic",
    device: str | None = None,
) -> Fit:
    """The largest batch (or `dim`) whose training step fits in `budget`, and the plan for it. No step is run; single kernels as
    in `remat.plan`, at the sizes that are tried.

    The example inputs say where to start. Arguments not told here are as in `remat.plan`.

    Args:
        budget: an amount of memory: bytes, "24GiB", "80%" of the device or "auto". A share of the step itself is none.
        dim: "batch" or "seq", the first or second axis of the inputs; or a name that `dynamic_shapes` gives.
        dynamic_shapes: as in `torch.export.export`: which axes of which inputs belong to `dim`, as `Dim`s or their names.
        multiple_of: only multiples of this are tried.

    Raises:
        BudgetError: not even the smallest size fits.
        RematError: no such axis, or the step does not grow with it.
    """
    settings = Settings(budget, policy, trainable_only, host_budget, pin, costs, optimizer=optimizer)
    read = parse_budget(budget)
    if budget is None or read.share_of_activations is not None:
        raise RematError(f"budget={budget!r} grows with the step; fit() needs bytes, '24GiB', '80%' or 'auto'")
    if multiple_of < 1:
        raise RematError(f"multiple_of={multiple_of} must be at least 1")
    kwargs = kwargs or {}
    axes = named_axes(model, args, kwargs, dynamic_shapes)
    start = max(round(size_of(args, kwargs, axes, dim) / multiple_of), 1)

    def trial(units: int) -> _Trial:
        traced = trace(model, *resized(args, kwargs, axes, {dim: units * multiple_of}), optimizer, device, costs)
        limit = resolve_budget(read, traced.memory, traced.program.resident_bytes, 0)
        assert limit is not None
        other = traced.worth_sharing(limit, settings)
        return _Trial(traced, limit, min(each.least_bytes(settings) for each in (traced, other) if each is not None))

    trials = _Trials(trial)
    low, high, limit = _largest(trials, start, dim)
    if not low:
        trials.at[1].traced.planned(settings)  # which raises
    best, following = trials.at[low], trials.at.get(high)
    tried = {units * multiple_of: found.least_bytes for units, found in sorted(trials.at.items())}
    return Fit(
        dim,
        low * multiple_of,
        best.budget_bytes,
        best.traced.planned(settings)[1],
        high * multiple_of,
        following.least_bytes if following else None,
        "" if following else limit,
        tried,
    )


class _Trial(NamedTuple):
    """The model at one size: what it may use, and what its smallest plan needs."""

    traced: TracedModel
    budget_bytes: int
    least_bytes: int


class _Trials:
    """Those made so far, by size in units of `multiple_of`."""

    def __init__(self, make: Callable[[int], _Trial]) -> None:
        self.make = make
        self.at: dict[int, _Trial] = {}

    def room(self, units: int) -> int:
        """Bytes that the smallest plan leaves of the budget; negative if it does not fit."""
        if units not in self.at:
            self.at[units] = self.make(units)
        return self.at[units].budget_bytes - self.at[units].least_bytes


def _largest(trials: _Trials, start: int, dim: str) -> tuple[int, int, str]:
    """The largest size that fits (0: none) and the next, and why where it is the model that does not take that."""
    low, high, limit = _bracket(trials.room, start, dim)
    while high - low > 1:
        middle = (low + high) // 2
        if high in trials.at and len(trials.at) % 3:  # now and then by halves: a curve may be bent
            share = trials.room(low) / (trials.room(low) - trials.room(high))
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        try:
            fits = trials.room(middle) >= 0
        except CaptureError as error:
            fits, limit = False, str(error).splitlines()[0]
        low, high = (middle, high) if fits else (low, middle)
    return low, high, limit


def _bracket(room: Callable[[int], int], start: int, dim: str) -> tuple[int, int, str]:
    """A size that fits (0: none) and a larger one that does not, and why where it is the model that does not take it."""
    low, high = start, start
    if room(start) < 0:
        while room(low) < 0:
            if low == 1:
                return 0, 1, ""
            low, high = low // 2, low
        return low, high, ""
    for _ in range(_DOUBLINGS):
        low, high = high, high * 2
        try:
            if room(high) < 0:
                return low, high, ""
        except CaptureError as error:
            return low, high, str(error).splitlines()[0]
    raise RematError(f"the step fits at {dim} {high} and hardly grows with it; there is no largest size")
