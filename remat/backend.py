"""Door 2: `torch.compile(model, backend="remat", options={"budget": ...})`.

Dynamo hands over one graph at a time. AOTAutograd traces its joint graph, remat plans on it and partitions it, and the
halves go to Inductor (default) or run as plain FX graphs (`"compiler": "eager"`). Where the model has graph breaks, what the
earlier graphs keep for backward counts as resident for the later ones, and a graph that is known not to be the last takes
half of the room above its own smallest peak.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat.budget import BudgetLike, memory_of, parse_budget, resolve_budget, resolve_host_budget
from remat.describe import describe
from remat.devices import profile_of
from remat.errors import RematError
from remat.inductor import backward_memory, compile_graph, forward_memory
from remat.ladder import Attempt, Ladder
from remat.op_times import check_costs, op_times
from remat.passes.aliasing import results, storage_roots
from remat.passes.joint_program import JointHalves, joint_program, largest_value, split_joint
from remat.passes.partition import partition
from remat.pins import Pins, check_pins, pinned
from remat.plan import Plan
from remat.planner import Menus, Solution, fastest_solution, make_menus, smallest_solution, solve
from remat.policies import Policy, check_fits, check_host, check_policy, is_planned, policy_solution
from remat.program import Program
from remat.workspace import library_bytes

COMPILERS = ("inductor", "eager")


@dataclass(frozen=True)
class Options:
    """The backend's options, checked when made."""

    budget: BudgetLike = None
    compiler: str = "inductor"
    policy: Policy = "auto"
    trainable_only: bool = True
    host_budget: int | str | None = 0
    pin: Pins = None
    costs: str = "analytic"

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Options:
        known = tuple(option.name for option in dataclasses.fields(cls))
        for name in options or {}:
            if name not in known:
                raise RematError(f"unknown option {name!r} of backend 'remat'; there are {', '.join(map(repr, known))}")
        read = cls(**dict(options or {}))
        parse_budget(read.budget)
        resolve_host_budget(read.host_budget, memory_of(torch.device("cpu")))
        if read.compiler not in COMPILERS:
            raise RematError(f"compiler={read.compiler!r} is unknown; there are {', '.join(map(repr, COMPILERS))}")
        check_policy(read.policy)
        check_pins(read.pin)
        check_costs(read.costs)
        return read


@dataclass
class CompiledPlan:
    """One graph of a compiled model: its plan, and the forward and backward graphs that run it."""

    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule
    frame: int


@dataclass
class _Session:
    """All graphs compiled with one options object, or by one `torch.compile` call without; they share the budget."""

    key: Any  # kept, so that its id stays its own
    graphs: list[CompiledPlan] = field(default_factory=list)

    def held_bytes(self, frame: int) -> int:
        """What the graphs that run before `frame` keep for backward."""
        latest = {graph.frame: graph for graph in self.graphs if graph.frame < frame}
        return sum(graph.plan.saved_bytes for graph in latest.values())


_sessions: dict[int, _Session] = {}


def remat_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend `remat`. Options: `compiler` ("inductor", "eager"); `budget`, `policy`, `trainable_only`,
    `host_budget`, `pin`, `costs` as in `remat.optimize`, but that nothing moves to the host unless `host_budget`, a policy or a
    pin says so."""
    if mode is not None:
        raise _torch.past_dynamo(RematError("backend 'remat' takes options, not mode; write options={'budget': ...}"))
    try:
        return _compile(gm, example_inputs, options)
    except RematError as error:
        raise _torch.past_dynamo(error) from error.__cause__


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None) -> Callable[..., Any]:
    read = Options.read(options)
    key = options if options is not None else _torch.compile_call()
    session = _sessions.setdefault(id(key), _Session(key))
    partitioner = _Partitioner(read, session, example_inputs, _torch.has_graph_break(gm))
    if read.compiler == "eager":
        return _torch.aot_eager(gm, example_inputs, _run_as_is, partitioner.split)
    return compile_graph(gm, example_inputs, partitioner.split, partitioner.uuid())


def _reset() -> None:
    _sessions.clear()


remat_backend.reset = _reset  # type: ignore[attr-defined]


def plans(compiled: Any) -> list[CompiledPlan]:
    """The plans of a model compiled with backend "remat", one per graph, with the rewritten forward and backward graphs.

    Empty before its first call. Raises RematError for anything else.
    """
    call = _torch.compile_call_of(compiled)
    if call is None or call.compiler_fn is not remat_backend:
        raise RematError('this was not compiled with torch.compile(..., backend="remat")')
    session = _sessions.get(id(call.kwargs.get("options", call)))
    return list(session.graphs) if session is not None else []


def _run_as_is(module: fx.GraphModule, _: Sequence[Any]) -> Callable[[list[Any]], Any]:
    def run(args: list[Any]) -> Any:
        return fx.Interpreter(module).boxed_run(args)  # a fresh one each time: it holds on to its results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _generated_peak(forward: fx.GraphModule, backward: fx.GraphModule, n_outputs: int) -> int:
    """Peak of either half above what is resident; the model's outputs are alive while backward runs."""
    roots = storage_roots(forward.graph)
    outputs = [n for n in results(forward.graph)[:n_outputs] if isinstance(n, fx.Node) and n.op == "call_function"]
    first = forward_memory(forward)
    second = backward_memory(backward, first, frozenset(roots[n].name for n in outputs))
    return max(first.peak_bytes, first.returned_bytes + second.peak_bytes - second.taken_bytes)


@dataclass(frozen=True)
class _Partitioner:
    """Plans one joint graph and splits it."""

    options: Options
    session: _Session
    inputs: Sequence[Any]
    more_graphs: bool

    def uuid(self) -> str:
        """Covers all that the partition depends on besides the graph itself."""
        parts = (
            self.options,
            self.session.held_bytes(_torch.frame_id()),
            self.more_graphs,
            _gradient_bytes(self.inputs),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def split(
        self,
        joint: fx.GraphModule,
        joint_inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's partition function."""
        fuses = self.options.compiler == "inductor"
        halves = split_joint(joint.graph, num_fwd_outputs, fuses)
        device = _device(joint)
        profile = profile_of(device)
        start = time.perf_counter()
        times = op_times(device) if self.options.costs == "measured" else None
        program = joint_program(joint.graph, halves, profile, self._resident(joint, device), fuses, times)
        if times is not None:
            times.save()
        program = pinned(program, halves.forward, self.options.pin)
        host = resolve_host_budget(self.options.host_budget, memory_of(device))
        menus = make_menus(program, host)

        slack = profile.slack_bytes(largest_value(program.values))

        def apply(solution: Solution) -> Attempt:
            dropped = frozenset(halves.forward[p].name for p in solution.dropped)
            starts = dict(program.moments)
            values = [program.values[trip.value] for trip in solution.replay.trips]
            moves = [(value.name, solution.moves[value.op]) for value in values]
            moved = {name: (halves.forward[move.release].name, starts.get(move.reload, "")) for name, move in moves}
            forward, backward = partition(joint, halves, dropped, moved, num_fwd_outputs, static_lifetime_input_indices)
            if not fuses:
                return Attempt(solution, forward, backward, solution.replay.peak_bytes)
            peak = program.resident_bytes + slack + _generated_peak(forward, backward, num_fwd_outputs)
            return Attempt(solution, forward, backward, peak)

        everything = fastest_solution(program, menus)
        baseline_bytes = everything.replay.peak_bytes
        limit, target = self._limits(program, menus, device, baseline_bytes)
        if not is_planned(self.options.policy):
            attempt = apply(self._policy_solution(joint, halves, program, menus, num_fwd_outputs))
            check_fits(attempt.solution, attempt.peak_bytes, limit, self.options.policy)
        elif target is None:
            attempt = apply(everything)
        elif fuses:
            attempt = Ladder(program, menus, everything, apply).fastest_within(target)
        else:
            attempt = apply(everything if baseline_bytes <= target else solve(program, menus, target))
        if attempt.solution is everything:
            baseline_bytes = attempt.peak_bytes
        if self.options.host_budget:
            check_host(attempt.solution, host, self.options.policy)
        seconds = time.perf_counter() - start
        text = "\n".join(f"{n.name} {n.target}" for n in joint.graph.nodes)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        nodes, solution = halves.forward, attempt.solution
        plan = describe(nodes, program, menus, solution, limit, seconds, str(device), "compiled", fingerprint)
        plan = dataclasses.replace(plan, peak_bytes=attempt.peak_bytes, baseline_peak_bytes=baseline_bytes)
        self.session.graphs.append(CompiledPlan(plan, attempt.forward, attempt.backward, _torch.frame_id()))
        return attempt.forward, attempt.backward

    def _policy_solution(
        self, joint: fx.GraphModule, halves: JointHalves, program: Program, menus: Menus, num_fwd_outputs: int
    ) -> Solution:
        gradients = results(joint.graph)[num_fwd_outputs:]
        primals = joint.graph.find_nodes(op="placeholder")
        trained = {node for node, gradient in zip(primals, gradients, strict=False) if gradient is not None}
        roots = storage_roots(joint.graph)
        reads = [{roots[source] for source in node.all_input_nodes} for node in halves.forward]
        trains = frozenset(p for p, read in enumerate(reads) if read & trained) if self.options.trainable_only else None
        return policy_solution(self.options.policy, program, halves.forward, menus.cuts, trains)

    def _limits(
        self, program: Program, menus: Menus, device: torch.device, baseline_bytes: int
    ) -> tuple[int | None, int | None]:
        """The budget in bytes, and what this graph may use of it."""
        limit = resolve_budget(parse_budget(self.options.budget), memory_of(device), program.resident_bytes, baseline_bytes)
        if limit is None or self.options.policy == "none":
            return limit, None
        between = limit // 50 if self.more_graphs or self.session.graphs else 0  # passes between graphs, and is in none
        target = limit - between
        if not self.more_graphs:
            return limit, target
        smallest = smallest_solution(program, menus).replay.peak_bytes
        return limit, max(smallest, smallest + (target - smallest) // 2)

    def _resident(self, joint: fx.GraphModule, device: torch.device) -> int:
        if device.type != "cpu":
            library_bytes(device)  # which from now on are there
            return torch.accelerator.memory_allocated(device)  # with all that earlier graphs hold, and the optimizer's state
        inputs = [n.meta["val"] for n in joint.graph.nodes if n.op == "placeholder" and "tangent" not in n.name]
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        own = sum(t.untyped_storage().nbytes() for t in tensors)
        return (
            int(own) + _gradient_bytes(self.inputs) + self.session.held_bytes(_torch.frame_id()) + self._rest_of_model(tensors)
        )

    def _rest_of_model(self, tensors: Sequence[torch.Tensor]) -> int:
        """Parameters that other graphs read; and before the last graph their gradients, which backward reaches first."""
        model = _torch.outermost_module()
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


def _gradient_bytes(inputs: Sequence[Any]) -> int:
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_leaf and t.grad is not None]
    return sum(t.grad.untyped_storage().nbytes() for t in leaves if t.grad is not None)


def _device(joint: fx.GraphModule) -> torch.device:
    tensors = [n.meta.get("val") for n in joint.graph.nodes if n.op == "placeholder"]
    return next((t.device for t in tensors if isinstance(t, torch.Tensor)), torch.device("cpu"))
