"""One graph of door 2, from AOTAutograd's joint graph to code: planned, split, compiled, and compiled again with another plan
where the code turns out to need more than the budget, or much less."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat._torch import pytree
from remat.budget import format_needed, memory_of, parse_budget, resolve_budget, resolve_host_budget
from remat.captured import attribute
from remat.describe import describe
from remat.devices import profile_of
from remat.errors import BudgetError, CaptureError, HostBudgetError, RematError, find_cause
from remat.generated import as_generated
from remat.inductor import Watch, compile_graph
from remat.ladder import Attempt, Ladder
from remat.menus import Menus, make_menus
from remat.op_times import op_times
from remat.passes.aliasing import results, storage_roots
from remat.passes.joint_program import JointHalves, joint_program, largest_value, split_joint
from remat.passes.ordering import parameters_first
from remat.passes.partition import partition
from remat.passes.provenance import source_line
from remat.patches import dropout_by_mask
from remat.pins import pinned, with_must
from remat.planner import Solution, fastest_solution, smallest_solution, solve
from remat.policies import check_fits, check_host, policy_solution
from remat.program import Program
from remat.session import CompiledPlan, Options, Session, read_by
from remat.table import announce
from remat.workspace import library_bytes

_PASSES = 50  # one part of so many of the budget is for what passes between the model's graphs, and is in none


@dataclass(frozen=True)
class _Task:
    """A joint graph as numbers, and what may be done with it. Bytes; `target` is what the graph may use of `limit`, `host` what
    its values may take of the host, None where nobody says."""

    halves: JointHalves
    fingerprint: str
    device: torch.device
    program: Program
    host: int | None
    menus: Menus
    everything: Solution
    limit: int | None
    target: int | None
    slack: int


class _Exceeded(Exception):
    """Ends a compilation whose code needs more than the budget."""


class Compilation:
    """Plans, splits and compiles one graph that Dynamo hands over, of the Dynamo frame of that number. `more_graphs`: it is
    known not to be the model's last."""

    def __init__(self, options: Options, session: Session, inputs: Sequence[Any], frame: int, more_graphs: bool) -> None:
        self.options, self.session, self.inputs = options, session, inputs
        self.frame, self.more_graphs = frame, more_graphs
        self._fuses = options.compiler == "inductor"
        self._watch = Watch(self._check)
        self._task: _Task | None = None  # None where there is nothing to train
        self._attempts: Generator[Attempt, int, None]
        self._attempt: Attempt
        self._halves: tuple[fx.GraphModule, fx.GraphModule]
        self._planning_s = 0.0
        self._peaks: list[tuple[int, int]] = []

    def run(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """The compiled graph. Its plan is added to the session."""
        code: Callable[..., Any] | None = self._compiled(gm)
        while self._task is not None:
            start = time.perf_counter()
            try:
                self._peaks.append((self._attempt.solution.replay.peak_bytes, self._peak_bytes(self._task)))
                self._attempt = self._attempts.send(self._peaks[-1][1])
            except StopIteration:
                break
            self._planning_s += time.perf_counter() - start
            code = self._compiled(gm, self._attempt.is_sparing)
        if code is None:
            raise RematError("Inductor generated other code for the same plan, which needs more than the budget")
        if self._task is not None:
            self._keep_plan(self._task)
        self.inputs = ()  # compiled code may hold this object, which should not hold a batch
        return code

    def _compiled(self, gm: fx.GraphModule, is_sparing: bool = False) -> Callable[..., Any] | None:
        """The code for one plan; None where that was given up, since it needs more than the budget."""
        if not self._fuses:
            dropout = {torch.ops.aten.native_dropout.default: dropout_by_mask}
            return _torch.aot_eager(gm, self.inputs, _run_as_is, self.split, dropout)
        try:
            return compile_graph(gm, self.inputs, self.split, self._watch, is_sparing)
        except Exception as error:  # ours, wrapped by whatever Inductor wraps it in, or another
            if find_cause(error, _Exceeded) is None:
                raise
            return None

    def _check(self) -> None:
        if self._task is not None and self._exceeds(self._task):
            raise _Exceeded

    def _exceeds(self, task: _Task) -> bool:
        if task.target is None or self.options.policy != "auto" or self._watch.backward is None:
            return False
        return self._peak_bytes(task) > task.target

    def _peak_bytes(self, task: _Task) -> int:
        if not self._fuses:
            return self._attempt.solution.replay.peak_bytes
        return task.program.resident_bytes + task.slack + self._watch.step.peak_bytes

    def split(
        self,
        joint: fx.GraphModule,
        joint_inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's partition function, called for each compilation."""
        _check_sizes(joint.graph)
        parameters_first(joint.graph, num_fwd_outputs)
        halves = split_joint(joint.graph, num_fwd_outputs, self._fuses)
        task = self._task
        if task is None or _names(task.halves) != _names(halves):
            start = time.perf_counter()
            task = self._task = self._planned(joint, halves)
            self._attempts = self._chosen(task, joint, num_fwd_outputs)
            self._attempt = next(self._attempts)
            self._planning_s += time.perf_counter() - start
        solution, program = self._attempt.solution, task.program
        if self._fuses and task.target is not None and solution is not task.everything:
            self._watch.room.update(solution.replay.room(max(task.target, solution.replay.peak_bytes)))
        if task.host is not None:
            check_host(solution, task.host, f"policy={self.options.policy!r}")
        dropped = frozenset(halves.forward[p].name for p in solution.dropped)
        repeats = {halves.forward[p].name: times for p, times in solution.repeats.items()}
        starts = dict(program.moments)
        moving = [program.values[trip.value] for trip in solution.replay.trips]
        moves = [(value.name, solution.moves[value.op]) for value in moving if value.bytes]
        moved = {name: (halves.forward[move.release].name, starts.get(move.reload, "")) for name, move in moves}
        self._halves = partition(joint, halves, dropped, repeats, moved, num_fwd_outputs, static_lifetime_input_indices)
        forward = self._halves[0]
        roots = storage_roots(forward.graph)
        outputs = [n for n in results(forward.graph)[:num_fwd_outputs] if isinstance(n, fx.Node) and n.op == "call_function"]
        held = {roots[n] for n in outputs}
        self._watch.kept = frozenset(node.name for node, root in roots.items() if root in held)
        return self._halves

    def _planned(self, joint: fx.GraphModule, halves: JointHalves) -> _Task:
        device = self._device
        profile = profile_of(device)
        times = op_times(device) if self.options.costs == "measured" else None
        program = joint_program(joint.graph, halves, profile, self._resident(joint, device), times)
        if times is not None:
            times.save()
        program = pinned(with_must(program, halves.forward), halves.forward, self.options.pin)
        asked = self.options.host_budget
        host = None if asked is None else resolve_host_budget(asked, memory_of(device))
        menus = make_menus(program, host or 0)
        everything = fastest_solution(menus)
        limit, target = self._limits(menus, device, everything.replay.peak_bytes)
        text = "\n".join(f"{n.name} {n.target}" for n in joint.graph.nodes)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        slack = profile.slack_bytes(largest_value(program.values))
        return _Task(halves, fingerprint, device, program, host, menus, everything, limit, target, slack)

    def _chosen(self, task: _Task, joint: fx.GraphModule, num_fwd_outputs: int) -> Generator[Attempt, int, None]:
        """Plans to compile, each answered with its peak in bytes; the last one is the one to take."""
        policy, everything = self.options.policy, task.everything
        if policy != "auto":
            solution = everything if policy == "none" else self._policy_solution(joint, task, num_fwd_outputs)
            peak = yield Attempt(solution)
            check_fits(solution, peak, task.limit, policy)
        elif task.target is None:
            yield Attempt(everything)
        else:
            try:
                yield from self._within(task, task.target)
            except BudgetError as error:
                if isinstance(error, HostBudgetError) or error.minimum_bytes is None or not self._shares:
                    raise
                raise self._of_all_graphs(error, error.minimum_bytes, task) from None

    def _within(self, task: _Task, target: int) -> Generator[Attempt, int, None]:
        if self._fuses:
            yield from Ladder(task.menus, task.everything).within(target)
        else:
            fits = task.everything.replay.peak_bytes <= target
            yield Attempt(task.everything if fits else solve(task.menus, target))

    def _of_all_graphs(self, error: BudgetError, minimum: int, task: _Task) -> BudgetError:
        """The error of one graph among several, with a budget for all of them at which this one gets what it needs. Of a larger
        budget each earlier graph keeps half of what reaches it, so that n of them leave this one 1 / 2^n of the increase."""
        frame, target = self.frame, task.target or 0
        if self.more_graphs:
            minimum = 2 * minimum - smallest_solution(task.menus).replay.peak_bytes
        earlier = [graph for graph in self.session.others(frame) if graph.frame < frame]
        more = (minimum - target) * (2 ** len(earlier) - 1)
        minimum += max(0, min(more, sum(graph.unsaved_bytes for graph in earlier)))
        minimum = -(-minimum * _PASSES // (_PASSES - 1))
        needed = format_needed(minimum)
        text = f"the model's graphs share the budget, of which one has a part: they need {needed} or more. {error}"
        return BudgetError(text, budget_bytes=task.limit, minimum_bytes=minimum, where=error.where)

    @property
    def _shares(self) -> bool:
        """True where the model is known to have more than this graph."""
        return self.more_graphs or bool(self.session.others(self.frame))

    def _keep_plan(self, task: _Task) -> None:
        solution, peak = self._attempt.solution, self._peak_bytes(task)
        about = task.limit, self._planning_s, str(task.device), "compiled", task.fingerprint
        plan = describe(task.halves.forward, task.menus, solution, *about)
        if self._fuses:
            plan = as_generated(plan, solution.replay, self._watch.step, task.slack)
            assert plan.peak_bytes == peak, "the storages of a plan add up to its peak"
        if solution is task.everything:
            plan = dataclasses.replace(plan, baseline_peak_bytes=peak, baseline_timeline=plan.timeline)
        _torch.publish("remat_plan", "json", plan.to_json)
        _torch.publish("remat_plan_table", "string", plan.summary)
        announce(plan)
        unsaved = task.everything.replay.saved_bytes - solution.replay.saved_bytes
        read = read_by(self._input_tensors) if task.device.type == "cpu" else ()  # others' allocators know
        self.session.graphs.append(CompiledPlan(plan, *self._halves, self.frame, tuple(self._peaks), unsaved, read))

    @property
    def _device(self) -> torch.device:
        """Where the step runs: a graph may begin with inputs that it copies there."""
        tensors = [t for t in self.inputs if isinstance(t, torch.Tensor)]
        chosen = next((t for t in tensors if t.requires_grad), tensors[0] if tensors else None)
        return torch.device("cpu") if chosen is None else chosen.device

    @property
    def _input_tensors(self) -> list[torch.Tensor]:
        """Those with memory of their own."""
        return [t for t in self.inputs if isinstance(t, torch.Tensor) and _torch.has_storage(t)]

    def _policy_solution(self, joint: fx.GraphModule, task: _Task, num_fwd_outputs: int) -> Solution:
        gradients = results(joint.graph)[num_fwd_outputs:]
        primals = joint.graph.find_nodes(op="placeholder")
        trained = {node for node, gradient in zip(primals, gradients, strict=False) if gradient is not None}
        roots = storage_roots(joint.graph)
        reads = [{roots[source] for source in node.all_input_nodes} for node in task.halves.forward]
        trains = frozenset(p for p, read in enumerate(reads) if read & trained) if self.options.trainable_only else None
        return policy_solution(self.options.policy, task.halves.forward, task.menus, trains)

    def _limits(self, menus: Menus, device: torch.device, baseline_bytes: int) -> tuple[int | None, int | None]:
        """The budget in bytes, and what this graph may use of it."""
        resident = menus.program.resident_bytes
        limit = resolve_budget(parse_budget(self.options.budget), memory_of(device, resident), resident, baseline_bytes)
        if limit is None:
            return None, None
        if self._shares or any(isinstance(t, torch.Tensor) and t.grad_fn is not None for t in self.inputs):
            self.session.say_broken()
        target = limit - limit // _PASSES if self._shares else limit
        if not self.more_graphs:
            return limit, target
        smallest = smallest_solution(menus).replay.peak_bytes
        return limit, target if target < smallest else smallest + (target - smallest) // 2

    def _resident(self, joint: fx.GraphModule, device: torch.device) -> dict[str, int]:
        inputs = [n.meta["val"] for n in joint.graph.nodes if n.op == "placeholder" and "tangent" not in n.name]
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        own = sum(int(t.untyped_storage().nbytes()) for t in tensors)
        parameters = [t for t in self.inputs if isinstance(t, torch.nn.Parameter)]
        trained = min(own, sum(t.untyped_storage().nbytes() for t in parameters))
        found = {"parameters": trained, "inputs": own - trained, "gradients": _gradient_bytes(self.inputs)}
        if device.type == "cpu":
            rest = self._rest_of_model(tensors) + _constant_bytes(joint)
            return {**found, "others": self.session.held_bytes(self.frame, self._input_tensors) + rest}
        found["libraries"] = library_bytes(device)  # which from now on are there
        allocated = torch.accelerator.memory_allocated(device)  # with all that earlier graphs hold, and the optimizer's state
        return {**found, "others": allocated - sum(found.values())}

    def _rest_of_model(self, tensors: Sequence[torch.Tensor]) -> int:
        """Parameters that other graphs read; and before the last graph their gradients, which backward reaches first."""
        model = None if self.session.model is None else self.session.model()
        if model is None:
            return 0
        here = Counter((tuple(map(int, t.shape)), t.dtype) for t in tensors)
        rest = 0
        for parameter in model.parameters():
            kind = (tuple(parameter.shape), parameter.dtype)
            if here[kind]:
                here[kind] -= 1
                continue
            rest += parameter.nbytes * (2 if self.more_graphs and parameter.requires_grad else 1)
        return rest


def _check_sizes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
        if any(map(_torch.free_unbacked_symbols, tensors)):
            raise CaptureError(
                f"the size of {node.name} ({source_line(node)}) depends on data, so that no plan can keep a budget; turn off "
                "capture_dynamic_output_shape_ops and capture_scalar_outputs in torch._dynamo.config, to end the graph there"
            )


def _names(halves: JointHalves) -> list[str]:
    return [node.name for node in halves.forward]


def _run_as_is(module: fx.GraphModule, _: Sequence[Any]) -> Callable[[list[Any]], Any]:
    def run(args: list[Any]) -> Any:
        return fx.Interpreter(module).boxed_run(args)  # a fresh one each time: it holds on to its results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _constant_bytes(joint: fx.GraphModule) -> int:
    """Of what ops bring along, which the compiled graphs hold."""
    found = (attribute(joint, str(node.target)) for node in joint.graph.find_nodes(op="get_attr"))
    tensors = {id(value): value for value in found if isinstance(value, torch.Tensor)}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def _gradient_bytes(inputs: Sequence[Any]) -> int:
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_leaf and t.grad is not None]
    return sum(t.grad.untyped_storage().nbytes() for t in leaves if t.grad is not None)
