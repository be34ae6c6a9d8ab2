"""From a solution to a `Plan`: names, reasons, source lines."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from remat.menus import Menus, without_gc
from remat.passes.provenance import common_module, module_path, source_line
from remat.plan import Activation, Block, Plan, PlannedCopy, Storage, Transfer
from remat.planner import Solution, fastest_solution
from remat.program import Decision, Program
from remat.replay import Replay


@without_gc()
def describe(
    nodes: Sequence[fx.Node],
    menus: Menus,
    solution: Solution,
    budget_bytes: int | None,
    planning_seconds: float,
    device: str,
    door: str,
    fingerprint: str,
    structure: str = "",
) -> Plan:
    """Put a solution in the words of the user's model. `nodes[p]` is forward op p of the program."""
    baseline, program = fastest_solution(menus).replay, solution.replay.program
    kept, wanted = _read_again(program, solution), _wanted(solution.replay)
    blocks = tuple(
        _block(index, nodes, program, solution, kept, wanted, start, stop)
        for index, (start, stop) in enumerate(_spans(menus, solution))
        if stop > start
    )
    return Plan(
        budget_bytes=budget_bytes,
        peak_bytes=solution.replay.peak_bytes,
        baseline_peak_bytes=baseline.peak_bytes,
        resident_bytes=program.resident_bytes,
        saved_bytes=solution.replay.saved_bytes,
        host_bytes=solution.replay.host_bytes,
        recompute_us=solution.replay.recompute_us,
        stall_us=solution.replay.stall_us,
        step_us=program.step_us + solution.replay.added_us,
        baseline_step_us=program.step_us,
        planning_seconds=planning_seconds,
        blocks=blocks,
        timeline=solution.replay.moments,
        baseline_timeline=baseline.moments,
        storages=tuple(_storages(solution.replay)),
        copies=tuple(_copies(solution.replay)),
        dropped=tuple(nodes[p].name for p in sorted(solution.dropped)),
        repeats=tuple((nodes[p].name, times) for p, times in sorted(solution.repeats.items())),
        regions=tuple((nodes[start].name, nodes[stop - 1].name) for start, stop in solution.regions),
        transfers=_transfers(nodes, program, solution),
        device=device,
        door=door,
        fingerprint=fingerprint,
        structure=structure,
        link=program.link,
        holds_outputs=program.holds_outputs,
    )


def _transfers(nodes: Sequence[fx.Node], program: Program, solution: Solution) -> tuple[Transfer, ...]:
    """In the order in which backward wants them."""
    starters = dict(program.moments)
    moved: dict[int, list[int]] = {}
    for trip in solution.replay.trips:
        moved.setdefault(program.values[trip.value].op, []).append(trip.value)
    return tuple(
        Transfer(
            nodes[op].name,
            tuple(sorted(program.forward[op].outputs.index(v) for v in values)),
            sum(program.values[v].bytes for v in values),
            nodes[solution.moves[op].release].name,
            starters.get(solution.moves[op].reload, ""),
        )
        for op, values in moved.items()
    )


def _copies(replay: Replay) -> Iterator[PlannedCopy]:
    for copy in replay.timing.copies:
        value = replay.program.values[copy.value]
        yield PlannedCopy(replay.program.name_of(copy.value), value.bytes, copy.is_back, copy.start_us, copy.end_us)


def resident_storages(program: Program, last: int) -> Iterator[Storage]:
    """What is there from the first moment to the last."""
    resident = (*program.resident, ("others", program.resident_bytes - sum(size for _, size in program.resident)))
    for kind, size in resident:
        if size:
            yield Storage(kind, kind, size, 0, last, "")


def _storages(replay: Replay) -> Iterator[Storage]:
    """All memory of the step: what is resident, what ops make, and their scratch memory."""
    program, schedule = replay.program, replay.schedule
    yield from resident_storages(program, len(schedule) - 1)
    for span in replay.spans:
        position = schedule[span.born][0]
        name = program.name_of(span.value) if span.value >= 0 else program.op_at(position).name
        if span.bytes:
            yield Storage(name, span.kind, span.bytes, span.born, span.dies, program.module_at(position))
    for index, (position, _) in enumerate(schedule):
        op = program.op_at(position)
        if op.workspace_bytes:
            yield Storage(f"scratch of {op.name}", "working set", op.workspace_bytes, index, index, program.module_at(position))


def _spans(menus: Menus, solution: Solution) -> list[tuple[int, int]]:
    """The plan's blocks: its regions, and the blocks between them that run inline."""
    inside = {cut for start, stop in solution.regions for cut in menus.cuts if start < cut < stop}
    edges = {edge for region in solution.regions for edge in region}
    return list(itertools.pairwise(sorted({*menus.cuts, *edges} - inside)))


def _read_again(program: Program, solution: Solution) -> frozenset[int]:
    """Values that a recomputed op reads."""
    return frozenset(v for p in solution.replay.recomputed for v in program.forward[p].inputs)


def _wanted(replay: Replay) -> dict[int, int]:
    """The moment of the timeline at which each value is first read, or made again, after forward."""
    program, found = replay.program, dict[int, int]()
    reads = dict(program.unpacked)
    for index, (position, again) in enumerate(replay.schedule):
        op = program.op_at(position)
        for v in (*op.inputs, *op.outputs) if again else reads.get(position, ()):
            found.setdefault(v, index)
    return found


def _block(
    index: int,
    nodes: Sequence[fx.Node],
    program: Program,
    solution: Solution,
    kept: frozenset[int],
    wanted: Mapping[int, int],
    start: int,
    stop: int,
) -> Block:
    region = next((f"region_{i}" for i, (a, b) in enumerate(solution.regions) if a <= start and stop <= b), "")
    activations, saved = [], 0
    for position in range(start, stop):
        for v in program.forward[position].outputs:
            value = program.values[v]
            if not value.reads and v not in kept:
                continue
            decision = _decision(position, solution)
            saved += value.bytes if decision is Decision.SAVE else 0
            repeats = solution.repeats.get(position, 0)
            activation = activation_of(nodes[position], program, v, decision, v in kept, repeats)
            again = wanted.get(v, 0)
            idle = min(value.last_forward + 1, again), again  # empty for one that somebody holds to the end
            activations.append(dataclasses.replace(activation, idle=idle))
    repeated = [p for p in solution.replay.recomputed if start <= p < stop]
    recompute_us = sum(program.forward[p].again_us for p in repeated)
    key = [(a.op, a.shape, a.dtype, a.decision) for a in activations]
    return Block(
        f"block_{index}",
        common_module(nodes[start:stop]),
        region,
        hashlib.sha256(repr(key).encode()).hexdigest()[:12],
        saved,
        recompute_us,
        tuple(activations),
    )


def _decision(position: int, solution: Solution) -> Decision:
    if position in solution.dropped:
        return Decision.RECOMPUTE
    return Decision.OFFLOAD if position in solution.moves else Decision.SAVE


def activation_of(
    node: fx.Node, program: Program, v: int, decision: Decision = Decision.SAVE, source: bool = False, repeats: int = 0
) -> Activation:
    """Value `v` of the program in the user's words. `source`: something is recomputed from it. `repeats`: how often it is let
    go of in backward."""
    value = program.values[v]
    outputs = program.forward[value.op].outputs
    shown = _shown(node, value.name, outputs.index(v))
    cost = program.forward[value.op].cost_us
    if program.forward[value.op].pin is not None:
        reason = "pinned"
    elif decision is Decision.OFFLOAD:
        reason = f"{value.bytes / 2**20:.2f} MiB wait on the host"
    elif decision is Decision.RECOMPUTE and not value.passing:
        reason = "fused into what reads it"
    elif decision is Decision.RECOMPUTE:
        times = f", {repeats + 1} times," if repeats else ""
        reason = f"{cost:.0f} us to compute again{times} frees {value.bytes / 2**20:.2f} MiB"
    elif repeats:
        reason = f"until backward first reads it; then {cost:.0f} us to compute again frees {value.bytes / 2**20:.2f} MiB"
    else:
        reason = value.pinned or ("others are recomputed from it" if source and not value.reads else "it fits")
    return Activation(
        program.name_of(v),
        str(node.target),
        tuple(map(int, shown.shape)) if shown is not None else (),  # sizes may be symbols
        str(shown.dtype).removeprefix("torch.") if shown is not None else "",
        value.bytes,
        cost,
        tuple(map(program.name_of, program.forward[value.op].inputs)),
        decision,
        reason,
        module_path(node),
        source_line(node),
        ways=_ways(program, value.op),
    )


def _shown(node: fx.Node, name: str, index: int) -> torch.Tensor | None:
    """What the node gives; of several results the item of that name, or the one with that index among those not empty (the
    state that a recurrent layer keeps is empty by its meta kernel)."""
    shown = next((user for user in node.users if user.name == name), node).meta.get("val")
    if shown is None or isinstance(shown, torch.Tensor):
        return shown
    made = [item for item in shown if isinstance(item, torch.Tensor) and item.numel()]
    return (made if index < len(made) else shown)[index]


def _ways(program: Program, op: int) -> tuple[Decision, ...]:
    """What can become of an op's results."""
    again = (Decision.RECOMPUTE,) if program.may_recompute(op) else ()
    return (Decision.SAVE, *again, *((Decision.OFFLOAD,) if program.may_move(op) else ()))
