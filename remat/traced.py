"""A training step before it is planned: recorded as numbers, ready for any budget."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from remat.budget import Memory, memory_of, parse_budget, resolve_budget, resolve_host_budget
from remat.describe import describe
from remat.devices import DeviceProfile
from remat.errors import RematError
from remat.in_flight import solve_in_flight, with_others
from remat.menus import Menus, make_menus
from remat.passes.aliasing import storage_roots
from remat.passes.regions import Stretch
from remat.pins import pinned
from remat.plan import Input, Plan
from remat.planner import Solution, frontier_solutions, smallest_solution, solve
from remat.policies import check_fits, check_host, is_planned, policy_solution
from remat.program import Move, Program
from remat.replay import Replay
from remat.settings import Settings
from remat.simulate import simulate


@dataclass(frozen=True)
class Traced:
    """A step as numbers. `nodes[p]` is forward op p of `program`; `trains` are those that read a trainable parameter; of what
    is resident, `there_bytes` are allocated already."""

    program: Program
    nodes: tuple[fx.Node, ...]
    device: torch.device
    profile: DeviceProfile
    fingerprint: str
    trains: frozenset[int]
    model: str
    inputs: tuple[Input, ...]
    there_bytes: int

    def plan(self, settings: Settings) -> Plan:
        """Plan for a budget, or take the plan given. Raises BudgetError when nothing fits."""
        start = time.perf_counter()
        if settings.plan is not None and settings.plan.fingerprint == self.fingerprint:
            return settings.plan
        program = pinned(self.program, self.nodes, settings.pin)
        others = settings.in_flight - 1
        everything = with_others(program, Solution(frozenset(), (), simulate(program, ())), others).replay
        limit = resolve_budget(parse_budget(settings.budget), self.memory, program.resident_bytes, everything.peak_bytes)
        host = resolve_host_budget(settings.host_budget, self.memory)
        menus = make_menus(program, host)
        given = self._given(settings.plan) if settings.plan is not None else None
        if given is not None and (limit is None or given.replay.peak_bytes <= limit):
            solution = given
        elif is_planned(settings.policy):
            solution = solve_in_flight(program, menus, None if settings.policy == "none" else limit, others)
        else:
            solution = self._by_rule(settings, program, menus)
            solution = with_others(program, solution, others)
            check_fits(solution, solution.replay.peak_bytes, limit, settings.policy)
        if settings.host_budget is not None:
            check_host(solution, host, settings.policy)
        found = self.describe(menus, solution, limit, time.perf_counter() - start)
        return with_baseline(found, everything) if others else found

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
        repeats = {position[name]: times for name, times in plan.repeats}
        return Solution(dropped, regions, simulate(self.program, dropped, moves, regions, repeats), moves, repeats)

    @cached_property
    def memory(self) -> Memory:
        """What the device has; one that is not there is taken to be empty, on a host with as much again."""
        total = self.profile.memory_bytes
        if self.profile.is_here or not total:
            return memory_of(self.device, self.there_bytes)
        return Memory(self.profile.name, total, total, total)

    @cached_property
    def structure(self) -> str:
        """Equal for graphs of the same ops, whatever their sizes."""
        program = self.program
        names = [op.name for op in (*program.forward, *program.backward)]
        reads = [(value.name, value.op, value.reads) for value in program.values]
        return hashlib.sha256(repr((names, reads)).encode()).hexdigest()[:16]

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
        dropped, repeats = frozenset(plan.dropped), dict(plan.repeats)
        stretches = []
        for first, last in plan.regions:
            members = self.nodes[position[first] : position[last] + 1]
            again = with_views(members, dropped.difference(repeats)).union(dropped.intersection(repeats))
            stretches.append(Stretch(tuple(n.name for n in members), again, repeats))
        return stretches


def with_baseline(plan: Plan, everything: Replay) -> Plan:
    """The plan beside another step with everything saved: the same one before its loss was taken in shares."""
    return dataclasses.replace(
        plan,
        baseline_peak_bytes=everything.peak_bytes,
        baseline_step_us=everything.program.step_us,
        baseline_timeline=everything.moments,
    )


def fingerprint_of(graphs: Sequence[fx.Graph]) -> str:
    """Equal for graphs of the same ops, arguments and shapes."""
    nodes = (node for graph in graphs for node in graph.nodes)
    text = "\n".join(f"{n.name} {n.target} {n.args} {getattr(n.meta.get('val'), 'shape', '')}" for n in nodes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shown(tensor: Input) -> str:
    return f"{tensor.name} {'x'.join(map(str, tensor.shape))} {tensor.dtype}"


def with_views(members: Sequence[fx.Node], dropped: frozenset[str]) -> frozenset[str]:
    """The dropped ops among `members`, and every view of their results."""
    roots = storage_roots(members[0].graph)
    return frozenset(node.name for node in members if roots[node].name in dropped)
