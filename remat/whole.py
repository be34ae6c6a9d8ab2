"""A whole model's training step: captured as one graph, recorded, planned and rewritten."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from remat import _torch
from remat._torch import pytree
from remat.absent import stand_in
from remat.capture import capture, check_model
from remat.captured import Captured, tensor_of
from remat.devices import device_profile
from remat.errors import BudgetError, HostBudgetError, RematError
from remat.export import as_in_training
from remat.passes.aliasing import storage_bytes, storage_roots
from remat.passes.losses import find_losses, share_losses
from remat.passes.regions import RegionGraph, form_regions
from remat.passes.transfers import Transfers
from remat.plan import Input, Plan
from remat.planner import Solution
from remat.record import record
from remat.resident import attributes_of
from remat.settings import Settings
from remat.site import Site, site_of
from remat.state import flatten_call
from remat.traced import ModelCall, Traced, fingerprint_of, with_baseline

_FASTEST = Settings(budget=None)
_MUCH = 0.1  # less of the room above what is resident is not worth a second plan


class Rewritten(NamedTuple):
    """A call as it was captured, and the graphs that run it under a plan: `outer`, which calls the `regions`."""

    captured: Captured
    plan: Plan
    outer: fx.Graph
    regions: tuple[RegionGraph, ...]


@dataclass(frozen=True)
class Rewriting:
    """Captures, plans and rewrites one kind of call at a time, as `settings` say."""

    settings: Settings

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured | None = None
    ) -> Rewritten:
        """`captured`: what such a call was captured as before, if it was."""
        traced = trace(model, args, kwargs, self.settings, captured=captured)
        step, plan = traced.planned(self.settings)
        outer, regions = form_regions(step.captured.graph, step.stretches(plan), transfers_of(plan))
        return Rewritten(traced.captured, plan, outer, regions)


@dataclass(frozen=True)
class TracedModel(Traced):
    """A captured model and its step as numbers."""

    captured: Captured
    again: Callable[[Captured], TracedModel]  # the same for another graph of the same step

    def planned(self, settings: Settings) -> tuple[TracedModel, Plan]:
        """The faster plan of this step and of the same step with its cross-entropy in shares, or the plan given where it
        serves; and which of them it is for. Raises BudgetError when neither fits."""
        limit = self.limit_bytes(settings.budget)
        settings = dataclasses.replace(settings, budget=limit)  # shares are of the step as it is written
        if settings.plan is not None:
            traced = self.of(settings.plan)
            if traced.given(settings.plan, limit) is not None:
                plan = traced.plan(settings)
                return traced, plan if traced is self else with_baseline(plan, self.everything)
            settings = dataclasses.replace(settings, plan=None)
        try:
            plan = self.plan(settings)
        except BudgetError as error:
            return self._planned_in_shares(settings, error)
        other = self.worth_sharing(limit, settings) if plan.recompute_us + plan.stall_us else None
        if other is None:
            return self, plan
        try:
            shared = other.plan(settings)
        except BudgetError:
            return self, with_baseline(plan, self.everything)
        traced, plan = min((self, plan), (other, shared), key=lambda pair: pair[1].step_us)
        return traced, with_baseline(plan, self.everything)

    def _planned_in_shares(self, settings: Settings, whole: BudgetError) -> tuple[TracedModel, Plan]:
        """The plan with shares where there is none without, however little they save: the error names the smallest budget of
        both ways, and that has to do."""
        other = self.in_shares(settings)
        if other is None:
            raise whole
        try:
            return other, with_baseline(other.plan(settings), self.everything)
        except BudgetError as shared:
            raise min(whole, shared, key=_shortage) from None

    def of(self, plan: Plan) -> TracedModel:
        """This step, or the same with its cross-entropy in shares: whichever the plan was made for."""
        if plan.structure == self.structure or self.sharing is None or plan.structure != self.sharing.structure:
            return self
        return self.sharing

    @cached_property
    def sharing(self) -> TracedModel | None:
        """The same step with cross-entropy computed a share of the rows at a time (remat/loss.py); None if it has none."""
        if not find_losses(self.captured.graph):
            return None
        return self.again(dataclasses.replace(self.captured, graph=share_losses(self.captured.graph)))

    def smallest_within(self, limit: int, settings: Settings) -> Solution:
        """`smallest`, with shares where they are worth it at that limit in bytes, or nothing fits without."""
        least = self.smallest(settings)
        other = self.worth_sharing(limit, settings)
        if other is None and least.replay.peak_bytes > limit:
            other = self.in_shares(settings)
        return least if other is None else min(least, other.smallest(settings), key=lambda s: s.replay.peak_bytes)

    def frontier(self, settings: Settings, points: int) -> list[Plan]:
        """Plans with and without shares, each smaller and slower than the one before."""
        plans = super().frontier(settings, points)
        other = self.worth_sharing(plans[-1].peak_bytes, settings)
        if other is not None:
            plans += [with_baseline(plan, self.everything) for plan in other.frontier(settings, points)]
        plans.sort(key=lambda p: (p.step_us, p.peak_bytes))
        smaller = itertools.accumulate((p.peak_bytes for p in plans), min, initial=plans[0].peak_bytes + 1)
        return [p for p, least in zip(plans, smaller, strict=False) if p.peak_bytes < least]

    def in_shares(self, settings: Settings) -> TracedModel | None:
        """`sharing` where the planner decides."""
        return self.sharing if settings.policy == "auto" and settings.pin is None and self.in_flight == 1 else None

    def worth_sharing(self, peak_bytes: int | None, settings: Settings) -> TracedModel | None:
        """`in_shares` where what autograd keeps of the loss is much of what such a peak has room for."""
        if peak_bytes is None:
            return None
        kept = sum(storage_bytes(loss.all_input_nodes[0].meta["val"]) for loss in find_losses(self.captured.graph))
        return self.in_shares(settings) if kept > _MUCH * (peak_bytes - self.program.resident_bytes) else None


def _shortage(error: BudgetError) -> tuple[bool, float]:
    """In which order errors are worth telling: those that name a budget, the smallest first, before those of the host."""
    return isinstance(error, HostBudgetError), math.inf if error.minimum_bytes is None else error.minimum_bytes


def transfers_of(plan: Plan) -> Transfers:
    """A plan's transfers, by the node at which each happens."""
    releases: dict[str, tuple[str, ...]] = {}
    reloads: dict[str, tuple[str, ...]] = {}
    for transfer in plan.transfers:
        releases[transfer.release] = (*releases.get(transfer.release, ()), transfer.name)
        if transfer.reload:
            reloads[transfer.reload] = (*reloads.get(transfer.reload, ()), transfer.name)
    return Transfers({transfer.name: transfer.outputs for transfer in plan.transfers}, releases, reloads)


@_torch.tracing_alone()
@as_in_training()
def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings = _FASTEST,
    device: str | None = None,
    captured: Captured | None = None,
) -> TracedModel:
    """Capture one call of `model` and record its training step, as on the device it is on or on a well-known one by name.
    Keeps nothing on the device; kernels run there for their scratch memory (remat/workspace.py).

    Of `settings` only what the step is counts: optimizer, costs, loss, holds_outputs and in_flight (with several, the step adds
    to gradients, whether there are any yet or not).
    """
    check_model(model, args, kwargs)
    inspect.signature(model.forward).bind(*args, **kwargs)  # a wrong call is a TypeError, as it always was
    absent = None
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    real = [*given, *model.parameters(), *model.buffers(), *attributes_of(model)]
    if device is not None:
        if settings.costs == "measured":
            raise RematError(f"costs='measured' needs the device itself; without device={device!r} this machine's is measured")
        absent = device_profile(device)
        model, args, kwargs = stand_in(model, args, kwargs)
    check_training(model)
    captured = captured or capture(model, args, kwargs)
    tensors = placeholder_tensors(captured, model, args, kwargs)
    if not any(t.requires_grad for t in tensors):
        raise RematError("no parameter or input requires grad, so there is no backward to plan for; unfreeze something first")
    place = next((t.device for t in tensors if t.requires_grad), torch.device("cpu"))
    others = [*(t for t in attributes_of(model) if t.device == place), *captured.read_by_functions()]
    site = site_of(place, settings, tensors, list(model.parameters()), list(model.buffers()), others, absent, real)
    return _recorded(ModelCall(type(model).__name__, inputs_of(args, kwargs)), tensors, site, settings, captured)


def check_training(model: nn.Module) -> None:
    """Raises RematError in eval mode."""
    if not model.training:
        raise RematError("the model is in eval mode, where its own forward runs; call model.train() first")


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Input, ...]:
    found = ((f"args{pytree.keystr(path)}", leaf) for path, leaf in pytree.tree_leaves_with_path(args))
    named = ((pytree.keystr(path)[2:].replace("']", "", 1), leaf) for path, leaf in pytree.tree_leaves_with_path(kwargs))
    tensors = ((name, leaf) for name, leaf in (*found, *named) if isinstance(leaf, torch.Tensor))
    return tuple(Input(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors)


def _recorded(
    call: ModelCall, tensors: Sequence[torch.Tensor], site: Site, settings: Settings, captured: Captured
) -> TracedModel:
    program = record(captured, tensors, site, settings)
    nodes = tuple(node for node in captured.graph.nodes if node.op == "call_function")
    found = program, nodes, site, fingerprint_of([captured.graph]), training(captured, tensors), call, settings.in_flight
    return TracedModel(*found, captured, partial(_recorded, call, tensors, site, settings))


def training(captured: Captured, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
    """Positions of the forward ops that read a trainable parameter."""
    roots = storage_roots(captured.graph)
    placeholders = captured.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, captured.sources, tensors, strict=True)
    ours = {node for node, source, tensor in pairs if source.kind == "parameter" and tensor.requires_grad}
    nodes = [node for node in captured.graph.nodes if node.op == "call_function"]
    return frozenset(p for p, node in enumerate(nodes) if any(roots[source] in ours for source in node.all_input_nodes))


def placeholder_tensors(
    captured: Captured, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """The tensor behind each placeholder of the captured graph."""
    flat, _ = flatten_call(args, kwargs)
    return [tensor_of(source, model, flat, captured.constants) for source in captured.sources]
