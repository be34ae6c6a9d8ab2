"""Door 1: `optimize`, and what can be asked before anything runs (`plan`, `frontier`, `explain`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from remat.budget import BudgetLike, format_bytes, format_needed
from remat.capture import check_inputs, check_model
from remat.errors import BudgetError, RematError
from remat.formulas import with_formulas
from remat.module import RematModule
from remat.pins import Pins
from remat.plan import Plan
from remat.planned import is_planned, only_plan
from remat.policies import Policy
from remat.settings import Settings
from remat.shapes import named_axes
from remat.sizes import SizedCall
from remat.whole import Rewriting, trace


def optimize(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike,
    policy: Policy = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    dynamic_shapes: Any = None,
    plan: Plan | None = None,
    trainable_only: bool = True,
    host_budget: int | str | None = None,
    pin: Pins = None,
    costs: str = "analytic",
    in_flight: int = 1,
    loss: Callable[[Any], torch.Tensor] | None = None,
    holds_outputs: bool = True,
) -> RematModule:
    """Rewrite `model` so that a training step fits in `budget`; returns a `torch.fx.GraphModule` to train as before.

    Args:
        model: in training mode, on one device. Its parameters are shared with the result, not copied.
        args: example inputs of one call, as given by position. Without inputs the model is captured at its first call.
        kwargs: those given by name.
        budget: peak of memory allocated on the device during forward and backward, resident memory included: bytes as an
            int, "24GiB" / "24GB", "80%" of the device, a float in (0, 1] (that share of the unoptimized step's peak above
            what is resident), "auto" (what the device has free, and what the step holds there already), or None (the
            fastest plan).
        policy: "auto" plans for the budget; "none" saves everything; "blocks", "every-k", "sqrt", "selective", "offload" and
            "offload-all" are the fixed rules of remat/policies.py, for which the budget is checked but changes nothing; a
            function from `Activation` to a `Decision` (None: save) decides for each activation.
        optimizer: its state counts as resident, whether it exists yet or not. Pickles leave it out.
        dynamic_shapes: as in `torch.export.export`; here it says which inputs may change shape without a notice. Each new
            shape is captured and planned when it comes.
        plan: a plan made earlier for the same model and shapes, whose decisions are taken instead of planning. One made with
            `dynamic_shapes` serves other sizes too, as far as it stays within the budget there; where it does not, another is
            made, and so where a step adds to gradients that were not there when it was planned.
        host_budget: host memory that values may wait in between forward and backward: bytes, "64GiB", or "50%" of what is free;
            by default half of what is free where the model is on a GPU, and none where it is on the host already.
        pin: decisions of yours for some activations, before those of the policy: `{"layers.*.mlp::aten.mm.default": "SAVE"}`,
            names of nested modules and an op, or the name of an activation as `explain` shows it (remat/pins.py).
        costs: "analytic" times of ops are computed from the device's rates; "measured" ones on the device, once for each op and
            shape, and kept for later processes.
        trainable_only: fixed rules leave blocks alone in which no parameter trains.
        in_flight: how many forwards run before the first backward, as in a stage of a pipeline (1F1B: its distance from the
            last stage, plus one); the budget is for all of them, and gradients count as there from the start.
        loss: what comes after the model, where that is not in it: a function from its output to the scalar that backward starts
            from, such as `lambda logits: F.cross_entropy(logits.flatten(0, 1), labels)`. Planning runs it on tensors without
            values, to count what it takes; training does not call it. It may read parameters and other tensors, but no results
            that have a graph already. Pickles leave it out. Without one the model's own `loss` is taken, or a loss that takes
            nothing but a gradient of each output.
        holds_outputs: whether the loop holds what the model returns until the step ends, as after `output = model(...)`;
            False where it keeps the loss alone, as with `model(...).loss.backward()`: then backward needs no room for logits or
            hidden states that it does not read. Where neither the model nor `loss=` tells the loss, outputs count as held.

    Raises:
        BudgetError: nothing fits, or not the plan given, or the budget cannot be read.
        CaptureError: the model cannot be captured as one graph.
    """
    check_model(model, args, kwargs)
    settings = Settings(
        budget=budget,
        policy=policy,
        trainable_only=trainable_only,
        host_budget=host_budget,
        pin=pin,
        costs=costs,
        plan=plan,
        optimizer=optimizer,
        in_flight=in_flight,
        loss=loss,
        holds_outputs=holds_outputs,
    )
    module = RematModule(model, Rewriting(settings), dynamic_shapes)
    if args or kwargs:
        module.capture(args, kwargs or {})
    return module


def plan(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike,
    policy: Policy = "auto",
    optimizer: torch.optim.Optimizer | None = None,
    dynamic_shapes: Any = None,
    plan: Plan | None = None,
    trainable_only: bool = True,
    host_budget: int | str | None = None,
    pin: Pins = None,
    costs: str = "analytic",
    device: str | None = None,
    in_flight: int = 1,
    loss: Callable[[Any], torch.Tensor] | None = None,
    holds_outputs: bool = True,
) -> Plan:
    """Plan one training step without running it. Kernels whose scratch memory is not known yet run once, by themselves, if the
    device has room for them. Arguments and errors as in `optimize`.

    dynamic_shapes: which axes may change, as in `torch.export.export`, or by name: `{"input_ids": {0: "batch", 1: "seq"}}`. The
        plan then has formulas: `plan.peak_bytes_at(batch=8, seq=4096)` is its peak at other sizes, `plan.peak_formula` the
        sympy expression. The step is recorded at three sizes of each axis for it.
    device: plan for a well-known device, which need not be there ("h100"; remat/devices.py has them), whatever the model and
        its inputs lie on, `meta` included. Nothing is run or allocated. "auto" and "80%" are of that device's memory.
    """
    settings = Settings(
        budget=budget,
        policy=policy,
        trainable_only=trainable_only,
        host_budget=host_budget,
        pin=pin,
        costs=costs,
        plan=plan,
        optimizer=optimizer,
        in_flight=in_flight,
        loss=loss,
        holds_outputs=holds_outputs,
    )
    _, found = trace(model, args, kwargs or {}, settings, device).planned(settings)
    if dynamic_shapes is None:
        return found
    axes = named_axes(model, args, kwargs or {}, dynamic_shapes)
    return with_formulas(found, SizedCall(model, args, kwargs or {}, axes, settings, device))


def frontier(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike = None,
    optimizer: torch.optim.Optimizer | None = None,
    host_budget: int | str | None = None,
    pin: Pins = None,
    costs: str = "analytic",
    device: str | None = None,
    in_flight: int = 1,
    loss: Callable[[Any], torch.Tensor] | None = None,
    holds_outputs: bool = True,
    points: int = 12,
) -> list[Plan]:
    """The trade-off between memory and time: the planner's plans from the fastest to the smallest, each smaller and slower than
    the one before. With a budget, only those within it.

    The other arguments are as in `plan`. points: how many plans to try for, the fastest and the smallest among them.

    Raises:
        BudgetError: none of them is within the budget, or that cannot be read.
        CaptureError: as in `optimize`.
        RematError: points is no number of plans.
    """
    if not isinstance(points, int) or points < 1:
        raise RematError(f"points={points} must be a whole number, at least 1")
    settings = Settings(
        budget=budget,
        host_budget=host_budget,
        pin=pin,
        costs=costs,
        optimizer=optimizer,
        in_flight=in_flight,
        loss=loss,
        holds_outputs=holds_outputs,
    )
    traced = trace(model, args, kwargs or {}, settings, device)
    limit = traced.limit_bytes(budget)
    plans = traced.frontier(settings, points)
    if limit is None or plans[-1].peak_bytes <= limit:
        return [p for p in plans if limit is None or p.peak_bytes <= limit]
    least = plans[-1].peak_bytes
    raise BudgetError(
        f"no plan fits in {format_bytes(limit)}; the smallest needs {format_needed(least)}. Raise budget=.",
        budget_bytes=limit,
        minimum_bytes=least,
        where=str(max(plans[-1].timeline, key=lambda moment: moment.live_bytes)),
    )


def explain(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, budget: BudgetLike = None
) -> Plan:
    """What would be saved, recomputed and why, as data whose `str` is the table. Without inputs, a model from `optimize`, under
    `enable` or compiled with backend "remat" explains its latest step."""
    check_inputs(args, kwargs)
    if is_planned(model) and not args and not kwargs:
        if budget is not None:
            raise RematError("this model has a plan already, which is explained without a budget; give remat.plan the original")
        return only_plan(model)
    return plan(model, args, kwargs, budget=budget)
