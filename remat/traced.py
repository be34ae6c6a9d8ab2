"""A training step before it is planned: recorded as numbers, ready for any budget."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from remat._torch import pytree
from remat.budget import (
    BudgetLike,
    format_bytes,
    format_needed,
    parse_budget,
    resolve_budget,
    resolve_host_budget,
)
from remat.describe import describe
from remat.errors import BudgetError, RematError
from remat.in_flight import solve_in_flight, with_others
from remat.menus import Menus, make_menus
from remat.passes.aliasing import storage_roots
from remat.passes.regions import Stretch
from remat.pins import pinned
from remat.plan import Input, Plan
from remat.planner import Solution, frontier_solutions, smallest_solution
from remat.policies import check_fits, check_host, policy_solution
from remat.program import KINDS, Move, Program
from remat.replay import Replay
from remat.settings import Settings
from remat.simulate import simulate
from remat.site import Site


class ModelCall(NamedTuple):
    """What a step is a step of: the class of the model, and the tensors that it is called with."""

    model: str
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class Traced:
    """A step as numbers. `nodes[p]` is forward op p of `program`; `trains` are those that read a trainable parameter.
    `in_flight` is how many forwards run before the first backward, which is no part of `program`."""

    program: Program
    nodes: tuple[fx.Node, ...]
    site: Site
    fingerprint: str
    trains: frozenset[int]
    call: ModelCall
    in_flight: int

    def plan(self, settings: Settings) -> Plan:
        """Plan for a budget, or take the plan given where it serves. Raises BudgetError when nothing fits."""
        start = time.perf_counter()
        limit, menus, given = self.limit_bytes(settings.budget), self._menus(settings), settings.plan
        taken = self.given(given, limit) if given is not None else None
        solution = taken or self._chosen(settings, menus, limit)
        if settings.host_budget is not None:
            host = resolve_host_budget(settings.host_budget, self.site.memory)
            check_host(solution, host, "the plan given" if taken else f"policy={settings.policy!r}")
        if given is not None and taken and (given.fingerprint, given.timeline) == (self.fingerprint, taken.replay.moments):
            return dataclasses.replace(given, budget_bytes=limit)
        return self.describe(menus, solution, limit, time.perf_counter() - start)

    def _menus(self, settings: Settings) -> Menus:
        program = pinned(self.program, self.nodes, settings.pin)
        return make_menus(program, resolve_host_budget(settings.host_budget, self.site.memory))

    def _chosen(self, settings: Settings, menus: Menus, limit: int | None) -> Solution:
        """What the planner finds, or a fixed rule says. Raises BudgetError where that is more than the limit, in bytes."""
        if settings.policy == "auto":
            return solve_in_flight(menus, limit, self.in_flight - 1)
        solution = self._by_rule(settings, menus)
        check_fits(solution, solution.replay.peak_bytes, limit, settings.policy)
        return solution

    def _by_rule(self, settings: Settings, menus: Menus) -> Solution:
        trains = self.trains if settings.trainable_only else None
        return self._in_flight(policy_solution(settings.policy, self.nodes, menus, trains))

    def smallest(self, settings: Settings) -> Solution:
        """The plan with the smallest peak that the planner knows, or that of the fixed rule that the settings name."""
        menus = self._menus(settings)
        return self._in_flight(smallest_solution(menus)) if settings.policy == "auto" else self._by_rule(settings, menus)

    def _in_flight(self, solution: Solution) -> Solution:
        """The same beside the other forwards that wait for their backward."""
        return with_others(solution, self.in_flight - 1)

    def limit_bytes(self, budget: BudgetLike) -> int | None:
        """What a budget means for this step, in bytes; None for no limit."""
        return resolve_budget(parse_budget(budget), self.site.memory, self.program.resident_bytes, self.everything.peak_bytes)

    @cached_property
    def everything(self) -> Replay:
        """The step with everything saved."""
        return self._in_flight(Solution(frozenset(), (), simulate(self.program, ()))).replay

    def given(self, plan: Plan, limit: int | None) -> Solution | None:
        """This step under the decisions of a plan made earlier; None where that needs more than the limit, in bytes, and
        another is to be made: for one made for a range of sizes, or before there were the gradients that this step adds to.

        Raises RematError for a plan made for other ops, or another size of them; BudgetError where the plan does not fit.
        """
        if plan.structure != self.structure:
            raise RematError(f"the plan given was made for another graph: {self.difference(plan)}; plan again")
        if plan.fingerprint != self.fingerprint and plan.peak_formula is None:
            raise RematError(
                f"the plan given was made for other sizes: {self.difference(plan)}; plan again, or for a range of them with "
                "dynamic_shapes="
            )
        solution = self.decided(plan)
        peak, where = solution.replay.peak_bytes, solution.replay.peak_at
        if limit is None or peak <= limit:
            return solution
        if plan.peak_formula is not None or self._gradient_bytes > _gradient_bytes(plan):
            return None
        raise BudgetError(
            f"the plan given needs {format_needed(peak)}, at {where}, more than the budget of "
            f"{format_bytes(limit)}. Raise budget=, or leave plan= out to plan for it.",
            budget_bytes=limit,
            minimum_bytes=peak,
            where=str(where),
        )

    @property
    def _gradient_bytes(self) -> int:
        """Of gradients that are there before the step."""
        return dict(self.program.resident).get("gradients", 0)

    def difference(self, plan: Plan) -> str:
        """In what a plan that was made for another step differs from this one."""
        parameters = dict(self.program.resident).get("parameters", 0), plan.at_peak().get("parameters", 0)
        pairs = [("the model", self.call.model, plan.model), ("bytes of parameters", *parameters)]
        pairs += [("an input", _shown(i), _shown(j)) for i, j in zip(self.call.inputs, plan.inputs, strict=False)]
        pairs += [("inputs", len(self.call.inputs), len(plan.inputs)), ("torch", torch.__version__, plan.torch_version)]
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
        replay = simulate(self.program, dropped, moves, regions, repeats)
        return self._in_flight(Solution(dropped, regions, replay, moves, repeats))

    @cached_property
    def structure(self) -> str:
        """Equal for steps with the same ops in forward, whatever their sizes: those that a plan decides about. Backward has
        more of them where it adds to gradients."""
        ops = [(op.name, op.inputs, op.outputs) for op in self.program.forward]
        return hashlib.sha256(repr(ops).encode()).hexdigest()[:16]

    def frontier(self, settings: Settings, points: int) -> list[Plan]:
        """Plans from the fastest to the smallest."""
        menus = self._menus(settings)
        plans = []
        start = time.perf_counter()
        for solution in map(self._in_flight, frontier_solutions(menus, points)):
            plans.append(self.describe(menus, solution, solution.replay.peak_bytes, time.perf_counter() - start))
            start = time.perf_counter()
        return plans

    def describe(self, menus: Menus, solution: Solution, limit: int | None, seconds: float) -> Plan:
        about = self.site.memory.name, "eager", self.fingerprint, self.structure
        plan = dataclasses.replace(describe(self.nodes, menus, solution, limit, seconds, *about), **self.call._asdict())
        return with_baseline(plan, self.everything) if self.in_flight > 1 else plan

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
    """Equal for graphs of the same ops, arguments, shapes and dtypes. (Strides depend on the device, where plans may not.)"""
    nodes = (node for graph in graphs for node in graph.nodes)
    text = "\n".join(f"{n.name} {n.target} {n.args} {_kinds(n.meta.get('val'))}" for n in nodes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kinds(value: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what an op returns."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [(tuple(t.shape), str(t.dtype)) for t in tensors]


def _gradient_bytes(plan: Plan) -> int:
    """Of gradients that were there before the step when it was planned."""
    return plan.timeline[0].by_kind[KINDS.index("gradients")] if plan.timeline else 0


def _shown(tensor: Input) -> str:
    return f"{tensor.name} {'x'.join(map(str, tensor.shape))} {tensor.dtype}"


def with_views(members: Sequence[fx.Node], dropped: frozenset[str]) -> frozenset[str]:
    """The dropped ops among `members`, and every view of their results."""
    roots = storage_roots(members[0].graph)
    return frozenset(node.name for node in members if roots[node].name in dropped)
