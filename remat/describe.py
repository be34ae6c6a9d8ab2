"""From a solution to a `Plan`: names, reasons, source lines."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from remat.plan import Activation, Block, Decision, Plan
from remat.planner import Menus, Solution, fastest_solution, without_gc
from remat.program import Program

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@without_gc()
def describe(
    nodes: Sequence[fx.Node],
    program: Program,
    menus: Menus,
    solution: Solution,
    budget_bytes: int | None,
    planning_seconds: float,
    device: str,
    door: str,
    fingerprint: str,
) -> Plan:
    """Put a solution in the words of the user's model. `nodes[p]` is forward op p of `program`."""
    baseline = fastest_solution(program, menus).replay
    kept = _read_again(program, solution)
    blocks = tuple(
        _block(index, nodes, program, solution, kept, start, stop)
        for index, (start, stop) in enumerate(_spans(menus, solution))
        if stop > start
    )
    return Plan(
        budget_bytes=budget_bytes,
        peak_bytes=solution.replay.peak_bytes,
        baseline_peak_bytes=baseline.peak_bytes,
        resident_bytes=program.resident_bytes,
        saved_bytes=solution.replay.saved_bytes,
        recompute_us=solution.replay.recompute_us,
        step_us=program.step_us + solution.replay.recompute_us,
        baseline_step_us=program.step_us,
        planning_seconds=planning_seconds,
        blocks=blocks,
        timeline=solution.replay.moments,
        dropped=tuple(nodes[p].name for p in sorted(solution.dropped)),
        regions=tuple((nodes[start].name, nodes[stop - 1].name) for start, stop in solution.regions),
        device=device,
        door=door,
        fingerprint=fingerprint,
    )


def _spans(menus: Menus, solution: Solution) -> list[tuple[int, int]]:
    """The plan's blocks: its regions, and the blocks between them that run inline."""
    inside = {cut for start, stop in solution.regions for cut in menus.cuts if start < cut < stop}
    cuts = [cut for cut in menus.cuts if cut not in inside]
    return list(itertools.pairwise(cuts))


def _read_again(program: Program, solution: Solution) -> frozenset[int]:
    """Values that a recomputed op reads."""
    return frozenset(v for p in solution.replay.recomputed for v in program.forward[p].inputs)


def _block(
    index: int,
    nodes: Sequence[fx.Node],
    program: Program,
    solution: Solution,
    kept: frozenset[int],
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
            dropped = position in solution.dropped
            saved += 0 if dropped else value.bytes
            activations.append(_activation(nodes[position], program, v, dropped, v in kept))
    again = [p for p in solution.replay.recomputed if start <= p < stop]
    recompute_us = sum(program.forward[p].cost_us + program.forward[p].launch_us for p in again)
    key = [(a.op, a.shape, a.dtype, a.decision) for a in activations]
    return Block(
        f"block_{index}",
        _common_module(nodes[start:stop]),
        region,
        hashlib.sha256(repr(key).encode()).hexdigest()[:12],
        saved,
        recompute_us,
        tuple(activations),
    )


def _activation(node: fx.Node, program: Program, v: int, dropped: bool, source: bool) -> Activation:
    value = program.values[v]
    outputs = program.forward[value.op].outputs
    name = node.name if len(outputs) == 1 else f"{node.name}.{outputs.index(v)}"
    shown = node.meta.get("val")
    shown = shown if isinstance(shown, torch.Tensor) else shown[outputs.index(v)] if shown is not None else None
    cost = program.forward[value.op].cost_us
    if dropped and not value.passing:
        reason = "fused into what reads it"
    elif dropped:
        reason = f"{cost:.0f} us to compute again frees {value.bytes / 2**20:.2f} MiB"
    else:
        reason = value.pinned or ("others are recomputed from it" if source and not value.reads else "it fits")
    return Activation(
        name,
        str(node.target),
        tuple(shown.shape) if shown is not None else (),
        str(shown.dtype).removeprefix("torch.") if shown is not None else "",
        value.bytes,
        cost,
        Decision.RECOMPUTE if dropped else Decision.SAVE,
        reason,
        module_path(node),
        source_line(node),
    )


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node came from, "" when unknown."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1].removeprefix("L['self'].").removeprefix("L['self']") if paths else ""


def source_line(node: fx.Node) -> str:
    """`file:line` of the user's code that the node came from, "" when unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def _common_module(nodes: Sequence[fx.Node]) -> str:
    paths = [path.split(".") for path in map(module_path, nodes) if path]
    if not paths:
        return ""
    shortest = min(paths, key=len)
    depth = next((i for i in range(len(shortest)) if any(p[i] != shortest[i] for p in paths)), len(shortest))
    common = ".".join(shortest[:depth])
    return common or f"{'.'.join(paths[0])} … {'.'.join(paths[-1])}"
