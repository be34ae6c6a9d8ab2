"""A model's training step before it is planned: captured, recorded as numbers, and ready for any budget."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn

from remat._torch import pytree
from remat.absent import LIBRARY_BYTES, stand_in
from remat.budget import BudgetLike, Memory, memory_of, parse_budget, resolve_budget, resolve_host_budget
from remat.capture import Captured, capture
from remat.describe import describe
from remat.devices import DeviceProfile, device_profile, profile_of
from remat.errors import BudgetError, RematError
from remat.op_times import OpTimes, check_costs, op_times
from remat.passes.aliasing import storage_bytes, storage_roots
from remat.passes.losses import find_losses, share_losses
from remat.passes.regions import RegionGraph, Stretch, form_regions
from remat.passes.transfers import Transfers
from remat.pins import Pins, check_pins, pinned
from remat.plan import Input, Plan
from remat.planner import Menus, Solution, frontier_solutions, make_menus, smallest_solution, solve
from remat.policies import Policy, check_fits, check_host, check_policy, is_planned, policy_solution
from remat.program import Move, Program
from remat.record import record
from remat.resident import resident_memory
from remat.simulate import Replay, simulate
from remat.workspace import library_bytes

_MUCH = 0.1  # less of the room above what is resident is not worth a second plan


@dataclass(frozen=True)
class Settings:
    """How to plan; checked when made. `optimizer_bytes` is the optimizer's state, counted as resident."""

    budget: BudgetLike
    policy: Policy = "auto"
    trainable_only: bool = True
    host_budget: int | str | None = None
    plan: Plan | None = None
    optimizer: torch.optim.Optimizer | None = None
    pin: Pins = None
    costs: str = "analytic"

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        resolve_host_budget(self.host_budget, memory_of(torch.device("cpu")))
        check_policy(self.policy)
        check_pins(self.pin)
        check_costs(self.costs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizer": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return self

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured | None = None
    ) -> tuple[Captured, Plan, fx.Graph, tuple[RegionGraph, ...]]:
        """Capture, plan and rewrite one kind of call; `captured` if it is known."""
        traced, plan = trace(model, args, kwargs, self.optimizer, costs=self.costs, captured=captured).planned(self)
        outer, regions = form_regions(traced.captured.graph, traced.stretches(plan), transfers_of(plan))
        return traced.captured, plan, outer, regions


@dataclass(frozen=True)
class Traced:
    """A captured model and its step as numbers."""

    captured: Captured
    program: Program
    device: torch.device
    profile: DeviceProfile
    fingerprint: str
    trains: frozenset[int]
    model: str
    inputs: tuple[Input, ...]
    again: Callable[[Captured], Traced]  # the same for another graph of the same step

    def planned(self, settings: Settings) -> tuple[Traced, Plan]:
        """The faster plan of this step and of the same step with its cross-entropy in shares, and which of them it is for.
        Raises BudgetError when neither fits."""
        if settings.plan is not None:
            return self.of(settings.plan), self.of(settings.plan).plan(settings)
        everything = simulate(self.program, ())
        peak = everything.peak_bytes
        limit = resolve_budget(parse_budget(settings.budget), self.memory, self.program.resident_bytes, peak)
        other = self.worth_sharing(limit, settings)
        if other is None:
            return self, self.plan(settings)
        settings = dataclasses.replace(settings, budget=limit)
        found: list[tuple[Traced, Plan]] = []
        errors: list[BudgetError] = []
        for traced in (self, other):
            try:
                found.append((traced, traced.plan(settings)))
            except BudgetError as error:
                errors.append(error)
            if found and not found[0][1].recompute_us + found[0][1].stall_us:
                break
        if not found:
            raise min(errors, key=lambda error: error.minimum_bytes or 0)
        traced, plan = min(found, key=lambda pair: pair[1].step_us)
        return traced, with_baseline(plan, everything)

    def of(self, plan: Plan) -> Traced:
        """This step, or the same with its cross-entropy in shares: whichever the plan was made for."""
        if plan.structure == self.structure or self.sharing is None or plan.structure != self.sharing.structure:
            return self
        return self.sharing

    @cached_property
    def sharing(self) -> Traced | None:
        """The same step with cross-entropy computed a share of the rows at a time (remat/loss.py); None if it has none."""
        if not find_losses(self.captured.graph):
            return None
        return self.again(dataclasses.replace(self.captured, graph=share_losses(self.captured.graph)))

    def worth_sharing(self, peak_bytes: int | None, settings: Settings) -> Traced | None:
        """`sharing` where the planner decides and what autograd keeps of the loss is much of what such a peak has room for."""
        if peak_bytes is None or settings.policy != "auto" or settings.pin is not None:
            return None
        kept = sum(storage_bytes(loss.all_input_nodes[0].meta["val"]) for loss in find_losses(self.captured.graph))
        return self.sharing if kept > _MUCH * (peak_bytes - self.program.resident_bytes) else None

    def plan(self, settings: Settings) -> Plan:
        """Plan for a budget, or take the plan given. Raises BudgetError when nothing fits."""
        start = time.perf_counter()
        if settings.plan is not None and settings.plan.fingerprint == self.fingerprint:
            return settings.plan
        program = pinned(self.program, self.nodes, settings.pin)
        baseline = simulate(program, ())
        limit = resolve_budget(parse_budget(settings.budget), self.memory, program.resident_bytes, baseline.peak_bytes)
        host = resolve_host_budget(settings.host_budget, self.memory)
        menus = make_menus(program, host)
        given = self._given(settings.plan) if settings.plan is not None else None
        if given is not None and (limit is None or given.replay.peak_bytes <= limit):
            solution = given
        elif is_planned(settings.policy):
            solution = solve(program, menus, None if settings.policy == "none" else limit)
        else:
            solution = self._by_rule(settings, program, menus)
            check_fits(solution, solution.replay.peak_bytes, limit, settings.policy)
        if settings.host_budget is not None:
            check_host(solution, host, settings.policy)
        return self.describe(menus, solution, limit, time.perf_counter() - start)

    def _by_rule(self, settings: Settings, program: Program, menus: Menus) -> Solution:
        trains = self.trains if settings.trainable_only else None
        return policy_solution(settings.policy, program, self.nodes, menus.cuts, trains)

    def least_bytes(self, settings: Settings) -> int:
        """The smallest peak of any plan, or that of the fixed rule that the settings name."""
        program = pinned(self.program, self.nodes, settings.pin)
        menus = make_menus(program, resolve_host_budget(settings.host_budget, self.memory))
        if settings.policy == "auto":
            return smallest_solution(program, menus).replay.peak_bytes
        return (
            solve(program, menus, None) if is_planned(settings.policy) else self._by_rule(settings, program, menus)
        ).replay.peak_bytes

    def _given(self, plan: Plan) -> Solution:
        """A plan made for other sizes. Raises RematError unless it was made for a range of them, and for these ops."""
        if plan.structure != self.structure:
            raise RematError(f"the plan given was made for another graph: {self.difference(plan)}; plan again")
        if plan.peak_formula is None:
            raise RematError(
                f"the plan given was made for other sizes: {self.difference(plan)}; plan again, or for a range of them with "
                "dynamic_shapes="
            )
        return self.decided(plan)

    def difference(self, plan: Plan) -> str:
        """In what a plan that was made for another step differs from this one."""
        parameters = dict(self.program.resident).get("parameters", 0), plan.at_peak().get("parameters", 0)
        pairs = [("the model", self.model, plan.model), ("bytes of parameters", *parameters)]
        pairs += [("an input", _shown(i), _shown(j)) for i, j in zip(self.inputs, plan.inputs, strict=False)]
        pairs += [("inputs", len(self.inputs), len(plan.inputs)), ("torch", torch.__version__, plan.torch_version)]
        pairs += [("ops in forward", len(self.program.forward), sum(m.phase == "forward" for m in plan.timeline))]
        found = (f"{name}: {theirs} there, {ours} here" for name, ours, theirs in pairs if ours != theirs)
        return next(found, "the ops themselves")

    def decided(self, plan: Plan) -> Solution:
        """This step under the decisions of a plan made for the same ops, at whatever sizes."""
        position = {node.name: i for i, node in enumerate(self.nodes)}
        starts = {name: p for p, name in self.program.moments}
        moves = {position[t.name]: Move(position[t.release], starts.get(t.reload, -1)) for t in plan.transfers}
        regions = tuple((position[first], position[last] + 1) for first, last in plan.regions)
        dropped = frozenset(position[name] for name in plan.dropped)
        return Solution(dropped, regions, simulate(self.program, dropped, moves, regions), moves)

    @cached_property
    def memory(self) -> Memory:
        """What the device has; one that is not there is taken to be empty but for the model, on a host with as much again."""
        total = self.profile.memory_bytes
        if self.profile.is_here or not total:
            return memory_of(self.device)
        return Memory(self.profile.name, total, total - self.program.resident_bytes, total)

    @cached_property
    def structure(self) -> str:
        """Equal for graphs of the same ops, whatever their sizes."""
        program = self.program
        names = [op.name for op in (*program.forward, *program.backward)]
        reads = [(value.name, value.op, value.reads) for value in program.values]
        return hashlib.sha256(repr((names, reads)).encode()).hexdigest()[:16]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self.captured.graph.nodes if node.op == "call_function"]

    def frontier(self, settings: Settings, points: int) -> Iterator[Plan]:
        """Plans from the fastest to the smallest."""
        start = time.perf_counter()
        program = pinned(self.program, self.nodes, settings.pin)
        menus = make_menus(program, resolve_host_budget(settings.host_budget, self.memory))
        for solution in frontier_solutions(program, menus, points):
            yield self.describe(menus, solution, solution.replay.peak_bytes, time.perf_counter() - start)
            start = time.perf_counter()

    def describe(self, menus: Menus, solution: Solution, limit: int | None, seconds: float) -> Plan:
        program, name = solution.replay.program, self.memory.name
        about = name, "eager", self.fingerprint, self.structure
        plan = describe(self.nodes, program, menus, solution, limit, seconds, *about)
        return dataclasses.replace(plan, model=self.model, inputs=self.inputs)

    def stretches(self, plan: Plan) -> list[Stretch]:
        """The regions of a plan, as names of nodes."""
        position = {node.name: i for i, node in enumerate(self.nodes)}
        dropped = frozenset(plan.dropped)
        stretches = []
        for first, last in plan.regions:
            members = self.nodes[position[first] : position[last] + 1]
            stretches.append(Stretch(tuple(n.name for n in members), with_views(members, dropped)))
        return stretches


def with_baseline(plan: Plan, everything: Replay) -> Plan:
    """The plan beside another step with everything saved: the same one before its loss was taken in shares."""
    return dataclasses.replace(
        plan,
        baseline_peak_bytes=everything.peak_bytes,
        baseline_step_us=everything.program.step_us,
        baseline_timeline=everything.moments,
    )


def transfers_of(plan: Plan) -> Transfers:
    """A plan's transfers, by the node at which each happens."""
    releases: dict[str, tuple[str, ...]] = {}
    reloads: dict[str, tuple[str, ...]] = {}
    for transfer in plan.transfers:
        releases[transfer.release] = (*releases.get(transfer.release, ()), transfer.name)
        if transfer.reload:
            reloads[transfer.reload] = (*reloads.get(transfer.reload, ()), transfer.name)
    return Transfers({transfer.name: transfer.outputs for transfer in plan.transfers}, releases, reloads)


def with_views(members: list[fx.Node], dropped: frozenset[str]) -> frozenset[str]:
    """The dropped ops among `members`, and every view of their results."""
    roots = storage_roots(members[0].graph)
    return frozenset(node.name for node in members if roots[node].name in dropped)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    device: str | None = None,
    costs: str = "analytic",
    captured: Captured | None = None,
) -> Traced:
    """Capture one call of `model` and record its training step, as on the device it is on or on a well-known one by name.
    Allocates nothing on the device."""
    profile = None
    if device is not None:
        if costs == "measured":
            raise RematError(f"costs='measured' needs the device itself; without device={device!r} this machine's is measured")
        profile = device_profile(device)
        model, args, kwargs = stand_in(model, args, kwargs)
    if not model.training:
        raise RematError("the model is in eval mode, where nothing is saved for backward; call model.train() first")
    captured = captured or capture(model, args, kwargs)
    tensors = placeholder_tensors(captured, model, args, kwargs)
    if not any(t.requires_grad for t in tensors):
        raise RematError("no parameter or input requires grad, so there is no backward to plan for; unfreeze something first")
    place = next((t.device for t in tensors if t.requires_grad), torch.device("cpu"))
    profile = profile or profile_of(place)
    libraries = library_bytes(place) if profile.is_here else LIBRARY_BYTES if profile.is_gpu else 0
    resident = {**resident_memory(tensors, model, optimizer), "libraries": libraries}
    times = op_times(place) if costs == "measured" else None
    return _traced(captured, type(model).__name__, _inputs(args, kwargs), tensors, place, profile, resident, times)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Input, ...]:
    found = ((f"args{pytree.keystr(path)}", leaf) for path, leaf in pytree.tree_leaves_with_path(args))
    named = ((pytree.keystr(path)[2:].replace("']", "", 1), leaf) for path, leaf in pytree.tree_leaves_with_path(kwargs))
    tensors = ((name, leaf) for name, leaf in (*found, *named) if isinstance(leaf, torch.Tensor))
    return tuple(Input(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors)


def _shown(tensor: Input) -> str:
    return f"{tensor.name} {'x'.join(map(str, tensor.shape))} {tensor.dtype}"


def _traced(
    captured: Captured,
    model: str,
    inputs: tuple[Input, ...],
    tensors: Sequence[torch.Tensor],
    place: torch.device,
    profile: DeviceProfile,
    resident: Mapping[str, int],
    times: OpTimes | None,
) -> Traced:
    program = record(captured, tensors, profile, resident, times)
    if times is not None:
        times.save()
    text = "\n".join(f"{n.name} {n.target} {n.args} {getattr(n.meta.get('val'), 'shape', '')}" for n in captured.graph.nodes)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    again = partial(
        _traced, model=model, inputs=inputs, tensors=tensors, place=place, profile=profile, resident=resident, times=times
    )
    return Traced(captured, program, place, profile, fingerprint, _training(captured, tensors), model, inputs, again)


def _training(captured: Captured, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
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
    named = dict(itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    flat = pytree.tree_leaves((args, dict(sorted(kwargs.items()))))
    return [
        flat[source.index]
        if source.kind == "input"
        else captured.constants[source.name]
        if source.kind == "constant"
        else named[source.name]
        for source in captured.sources
    ]
