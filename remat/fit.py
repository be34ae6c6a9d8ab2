"""The inverse question: the largest batch or the longest sequence that a budget has room for, found by planning.

No step runs and nothing runs out of memory: each size that is tried (remat/solvers/largest.py) is captured and planned, as
`remat.plan` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from remat.budget import BudgetLike, format_bytes, format_needed, parse_budget
from remat.capture import check_model
from remat.errors import BudgetError, CaptureError, RematError
from remat.pins import Pins
from remat.plan import Plan
from remat.planner import Solution
from remat.policies import Policy
from remat.settings import Settings
from remat.shapes import named_axes, range_of
from remat.sizes import SizedCall
from remat.solvers.largest import largest
from remat.whole import TracedModel


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
        needs = f"{self.next_size} needs {format_needed(self.next_bytes)}" if self.next_bytes is not None else self.limit
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
    in_flight: int = 1,
    loss: Callable[[Any], torch.Tensor] | None = None,
    holds_outputs: bool = True,
) -> Fit:
    """The largest batch (or `dim`) whose training step fits in `budget`, and the plan for it. No step is run; single kernels as
    in `remat.plan`, at the sizes that are tried.

    The example inputs say where to start. Arguments not told here are as in `remat.plan`.

    Args:
        budget: an amount of memory: bytes, "24GiB", "80%" of the device or "auto". A share of the step itself is none.
        dim: "batch" or "seq", the first or second axis of the inputs; or a name that `dynamic_shapes` gives.
        dynamic_shapes: as in `torch.export.export`: which axes of which inputs belong to `dim`, as `Dim`s or their names.
            Sizes outside of a `Dim`'s `min` and `max` are not tried.
        multiple_of: only multiples of this are tried.

    Raises:
        BudgetError: not even the smallest size fits.
        CaptureError: the model cannot be captured at the example's size, or at those around it.
        RematError: no such axis, or the step does not grow with it.
    """
    settings = Settings(
        budget=budget,
        policy=policy,
        trainable_only=trainable_only,
        host_budget=host_budget,
        pin=pin,
        costs=costs,
        optimizer=optimizer,
        in_flight=in_flight,
        loss=loss,
        holds_outputs=holds_outputs,
    )
    if budget is None or parse_budget(budget).share_of_activations is not None:
        raise RematError(f"budget={budget!r} grows with the step; fit() needs bytes, '24GiB', '80%' or 'auto'")
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise RematError(f"multiple_of={multiple_of} must be a whole number, at least 1")
    check_model(model, args, kwargs)
    axes = named_axes(model, args, kwargs or {}, dynamic_shapes)
    question = _Question(SizedCall(model, args, kwargs or {}, axes, settings, device), dim, multiple_of, dynamic_shapes)
    trials = _Trials(question)
    try:
        low, high, limit = largest(trials.room, question.start, dim, question.least)
        if limit and low and question.guessed and {*trials.at} == {question.start}:
            trials.room(max(question.start // 2, 1))  # is it the largest, or the only one?
    except CaptureError as error:  # at a size smaller than the example's, or at that
        if question.guessed and trials.at:
            raise _only_as_given(question, str(error)) from error
        raise
    if not low and limit and question.guessed and len(trials.at) == 1 and not trials.takes(2 * question.start):
        raise _only_as_given(question, limit)
    if not low:
        raise _nothing_fits(question, high, trials.at[high])
    if limit and trials.takes(2 * low):
        raise RematError(
            f"the model runs at {dim} {2 * low * multiple_of}, and not at {high * multiple_of}: {limit} "
            "Say which sizes are to be tried, as with multiple_of=8."
        )
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
    """The model at one size: what it may use, and the smallest plan there, or what the policy says."""

    traced: TracedModel
    budget_bytes: int
    least: Solution

    @property
    def least_bytes(self) -> int:
        return self.least.replay.peak_bytes


@dataclass(frozen=True)
class _Question:
    """What is asked: sizes are counted in units of `multiple_of`."""

    call: SizedCall
    dim: str
    multiple_of: int
    dynamic_shapes: Any

    @property
    def guessed(self) -> bool:
        """True where nobody has said which axes belong to `dim`."""
        return self.dynamic_shapes is None

    @cached_property
    def sizes(self) -> range:
        """Those allowed, not in units."""
        return range_of(self.call.model, self.call.args, self.call.kwargs, self.dynamic_shapes, self.dim)

    @property
    def start(self) -> int:
        """The example's size, or the nearest one allowed, in units."""
        most = (self.sizes.stop - 1) // self.multiple_of
        return max(min(self.call.size_of(self.dim) // self.multiple_of, most), self.least)

    @property
    def least(self) -> int:
        """The smallest size allowed, in units."""
        return -(-self.sizes.start // self.multiple_of)

    def trial(self, units: int) -> _Trial:
        if units * self.multiple_of >= self.sizes.stop:
            raise CaptureError(f"dynamic_shapes says that {self.dim} is at most {self.sizes.stop - 1}")
        settings = self.call.settings
        traced = self.call.traced({self.dim: units * self.multiple_of})
        limit = traced.limit_bytes(settings.budget)
        assert limit is not None, "a budget for fit() is one in bytes"
        return _Trial(traced, limit, traced.smallest_within(limit, settings))


def _only_as_given(question: _Question, reason: str) -> RematError:
    """The error where the model takes no size but the example's, and it may be that not all axes were resized."""
    dim = question.dim
    return RematError(
        f"the model runs at {dim} {question.start * question.multiple_of}, the example's, and at no other: "
        f"{reason.splitlines()[0]} By default {dim!r} is one axis of each input; where more axes grow with it, as in a mask, "
        f"name them all with dynamic_shapes={{'mask': {{2: {dim!r}, 3: {dim!r}}}, ...}}."
    )


def _nothing_fits(question: _Question, units: int, smallest: _Trial) -> BudgetError:
    """The error where the smallest size needs more than the budget."""
    policy, where = question.call.settings.policy, str(smallest.least.replay.peak_at)
    size = f"{question.dim} {units * question.multiple_of}"
    rule = "" if policy == "auto" else f" with policy={policy!r}"
    return BudgetError(
        f"no plan fits in {format_bytes(smallest.budget_bytes)}: {size}{rule} needs "
        f"{format_needed(smallest.least_bytes)} or more, at {where}. Raise budget=.",
        budget_bytes=smallest.budget_bytes,
        minimum_bytes=smallest.least_bytes,
        where=where,
    )


class _Trials:
    """Those made so far, by size in units of `multiple_of`."""

    def __init__(self, question: _Question) -> None:
        self.question = question
        self.at: dict[int, _Trial] = {}

    def room(self, units: int) -> int:
        """Bytes that the smallest plan leaves of the budget; negative if it does not fit."""
        if units not in self.at:
            self.at[units] = self.question.trial(units)
        return self.at[units].budget_bytes - self.at[units].least_bytes

    def takes(self, units: int) -> bool:
        """Whether the model runs at this size."""
        try:
            self.room(units)
        except CaptureError:
            return False
        return True
