"""A step beside its plan: what was predicted and what the allocator did, over time and in figures."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from remat._torch import backward_start_ns, pytree
from remat.backward import own_loss
from remat.budget import format_bytes
from remat.capture import check_inputs
from remat.errors import RematError
from remat.measure import live_bytes, profiled, reachable, resident_storages
from remat.plan import Plan
from remat.planned import is_planned, only_plan, plans_of, plans_so_far
from remat.program import KINDS
from remat.table import aligned


@dataclass(frozen=True)
class Check:
    """One figure of a step, predicted and measured, in bytes."""

    name: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """By which share of what was measured the prediction is too high; below zero it is too low."""
        return self.predicted_bytes / self.measured_bytes - 1 if self.measured_bytes else float(self.predicted_bytes > 0)


@dataclass(frozen=True)
class Verification:
    """A measured step beside its plan. `measured` is (microseconds from its start, live bytes) after each event of the
    allocator; `backward_us` is when backward started."""

    plan: Plan = field(repr=False)
    checks: tuple[Check, ...]
    measured: tuple[tuple[float, int], ...] = field(repr=False)
    backward_us: float
    time_s: float

    @property
    def peak_bytes(self) -> int:
        return max(live for _, live in self.measured)

    @property
    def holds(self) -> bool:
        """True if the measured peak is within the predicted one."""
        return self.peak_bytes <= self.plan.peak_bytes

    def __str__(self) -> str:
        rows = [("", "predicted", "measured", "error")]
        for check in self.checks:
            sizes = format_bytes(check.predicted_bytes), format_bytes(check.measured_bytes)
            rows.append((check.name, *sizes, f"{check.error:+.1%}"))
        verdict = "the measured peak is within the prediction" if self.holds else "the step took more than was predicted"
        return "\n".join([*aligned(rows), verdict])

    def chart(self) -> Any:
        """Both timelines in one picture, an Altair chart. Raises RematError without the extra `report`."""
        from remat.views import charts

        return charts.verification(self)

    def _repr_html_(self) -> str:
        from remat.views import charts

        return f"<pre>{html.escape(str(self))}</pre>{charts.svg(self.chart())}"


def verify(
    model_or_step: nn.Module | Callable[[], object],
    plan: Plan | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Verification:
    """Run a step twice, once to warm up, and hold what the allocator did in the second against the plan.

    Args:
        model_or_step: a function that takes the step (forward and backward, nothing more), or a model, whose step is a call
            with `args` and `kwargs` and the backward of its loss: what is named `loss` in its output, or a scalar that all else
            has led to, else the sum of what it returns. It holds the output if the plan does. With a loss outside of the model,
            give a function, in which a variable holds the output.
        plan: by default that of the model for such a step, from `remat.optimize`, under `remat.enable` or compiled with backend
            "remat".

    The step starts with gradients only if the plan counts them as resident; those that are there are put back afterwards.
    Buffers change as they do in any step.

    Raises RematError when there is no plan, or something else in its place, or no backward.
    """
    check_inputs(args, kwargs)
    if plan is None and not is_planned(model_or_step):
        raise RematError("there is no plan to hold the step against: pass plan=, or a model that remat trains")
    if plan is None and not args and not kwargs:
        plans_of(model_or_step)  # without inputs no step can lead to one
    if plan is not None and not isinstance(plan, Plan):
        raise RematError(f"plan= has to be a remat.Plan, not a {type(plan).__name__}; inputs go into args= and kwargs=")
    step: Callable[..., object] = model_or_step
    if isinstance(model_or_step, nn.Module):
        step = partial(_step, model_or_step, args, kwargs or {})
    leaves = {id(t): t for t in reachable(step) if t.is_leaf and t.requires_grad}.values()
    before = [leaf.grad for leaf in leaves]
    known = [plan] if plan is not None else [each.plan for each in plans_so_far(model_or_step)]
    has_gradients = any(each.timeline[0].by_kind[KINDS.index("gradients")] for each in known)
    try:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = torch.zeros_like(leaf) if has_gradients and gradient is not None else None
        step()  # gives a gradient to the others that get one
        for leaf in leaves:
            leaf.grad = leaf.grad if has_gradients else None
        if has_gradients and any(gradient is None for gradient in before):
            step()  # now that there are gradients to add to, which is planned otherwise
        plan = plan or only_plan(model_or_step)
        if isinstance(model_or_step, nn.Module):
            step = partial(step, holds_output=plan.holds_outputs)
        return _held_against(plan, step)
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


def _held_against(plan: Plan, step: Callable[[], object]) -> Verification:
    tensors = reachable(step)
    device = next((t.device for t in tensors if t.device.type not in ("cpu", "meta")), torch.device("cpu"))
    if device.type == "cpu":
        with resident_storages(tensors) as (resident, released):
            profile, seconds = profiled(step)
    else:
        torch.accelerator.synchronize(device)
        resident, released = torch.accelerator.memory_allocated(device), []
        profile, seconds = profiled(step)
    events = [(at, resident + above) for at, above in live_bytes(profile, released, device.type)]
    backward_ns = backward_start_ns(profile)
    if backward_ns is None or not events:
        raise RematError("the step has no backward, so there is nothing to hold against a plan")
    start = events[0][0]
    forward = [live for at, live in events if at < backward_ns]
    backward = [live for at, live in events if at >= backward_ns]
    turn = next(i for i, moment in enumerate(plan.timeline) if moment.is_backward)
    live = [moment.live_bytes for moment in plan.timeline]
    kept = sum(s.bytes for s in plan.storages if s.born < turn <= s.dies)
    checks = (
        Check("there before", plan.resident_bytes, resident),
        Check("forward's peak", max(live[:turn]), max(forward, default=resident)),
        Check("kept for backward", kept, forward[-1] if forward else resident),
        Check("backward's peak", max(live[turn:]), max(backward, default=resident)),
        Check("there afterwards", live[-1], events[-1][1]),
        Check("peak", plan.peak_bytes, max(live for _, live in events)),
    )
    measured = tuple(((at - start) / 1e3, size) for at, size in events)
    return Verification(plan, checks, measured, (backward_ns - start) / 1e3, seconds)


def _step(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], holds_output: bool = True) -> Any:
    """A model's forward, and the backward of its loss. Returns what a loop holds."""
    output = model(*args, **kwargs)
    loss = own_loss(output)
    if loss is None:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not tensors:
            raise RematError("the model returns nothing that requires grad, so there is no backward to run")
        loss = torch.stack([t.float().sum() for t in tensors]).sum()
    held = output if holds_output else loss
    del output
    loss.backward()
    return held
