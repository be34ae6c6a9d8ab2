"""Policies with a name: what people use today, as decisions for the same machinery.

"none"        everything is saved, but what a compiler fuses into its readers at no cost
"blocks"      each block is a checkpoint: its inputs are saved, all inside is recomputed (`gradient_checkpointing_enable()`)
"every-k"     each k-th block is one, the others save everything (torchtitan's layer option)
"sqrt"        about √n segments of blocks, each a checkpoint (Chen et al. 2016)
"selective"   in each block matrix products, convolutions and attention are saved, the rest is recomputed
"offload"     as "blocks", and the blocks' inputs lie on the host between forward and backward (Unsloth)
"offload-all" everything that backward reads lies on the host, nothing is recomputed

A block is an element of the outermost ModuleList or Sequential; where a model has none, a stretch between the planner's cuts.
A policy may also be a function from `Activation` to a `Decision`, or its name, or None for "save".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import fx

from remat.budget import format_bytes, format_needed
from remat.describe import activation_of
from remat.errors import BudgetError, HostBudgetError, RematError
from remat.menus import Menus
from remat.passes.provenance import module_path
from remat.pins import read_decision
from remat.plan import Activation
from remat.planner import Solution, fastest_solution, solution_of
from remat.program import Decision, Program
from remat.solvers.improve import prune

Policy: TypeAlias = "str | Callable[[Activation], Decision | str | None]"
Span: TypeAlias = "tuple[int, int]"

NAMED = ("none", "blocks", "sqrt", "selective", "offload", "offload-all")
_EVERY = re.compile(r"every-([1-9]\d*)")
_ELEMENT = re.compile(r"^(?:.*?\.)??\d+(?=\.|$)")
_aten = torch.ops.aten
_DEAR = {
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.matmul, _aten.linear, _aten.convolution,
    _aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_cudnn_attention,
    _aten.scaled_dot_product_attention, _aten._grouped_mm,
}  # fmt: skip


def check_policy(policy: Policy) -> None:
    """Raises RematError when there is no such policy."""
    if callable(policy) or policy in ("auto", *NAMED) or (isinstance(policy, str) and _EVERY.fullmatch(policy)):
        return
    known = ", ".join(map(repr, ("auto", *NAMED)))
    raise RematError(f"policy={policy!r} is unknown; there are {known}, 'every-2' (any number), or a function of an Activation")


def policy_solution(policy: Policy, nodes: Sequence[fx.Node], menus: Menus, trains: frozenset[int] | None) -> Solution:
    """The decisions of a policy. `nodes[p]` is forward op p of the program that `menus` are for.

    trains: the positions that read a trainable parameter; blocks without any save everything. None: all blocks count.
    """
    if policy == "none":
        return fastest_solution(menus)
    program = menus.program
    spans = blocks(nodes) or [(a, b) for a, b in itertools.pairwise(menus.cuts) if b > a]
    if program.parts:
        spans = list(program.parts)
    if trains is not None:
        spans = [(a, b) for a, b in spans if any(a <= p < b for p in trains)]
    if callable(policy):
        return _by_activation(policy, program, nodes, spans)
    if policy == "offload-all":
        moved = frozenset(
            v.op for a, b in spans for v in program.values if v.reads and a <= v.op < b and _may_move(program, v.op)
        )
        return _decided(program, frozenset(), moved, spans)
    inputs: frozenset[int] = frozenset()
    if match := _EVERY.fullmatch(policy):
        spans = spans[:: int(match[1])]
    elif policy == "sqrt":
        size = math.ceil(math.sqrt(len(spans)))
        groups = [spans[i : i + size] for i in range(0, len(spans), size)]
        spans = [(group[0][0], group[-1][1]) for group in groups if group]
    elif policy == "offload":
        inputs = frozenset(p for span in spans for p in _read_from_outside(program, span) if _may_move(program, p))
    dropped = {p for span in spans for p in range(*span) if _may_drop(program, p, span[1])}
    if policy == "selective":
        dropped = {p for p in dropped if getattr(nodes[p].target, "overloadpacket", None) not in _DEAR}
    return _decided(program, frozenset(dropped), inputs, spans)


def check_fits(solution: Solution, peak_bytes: int, limit: int | None, policy: Policy) -> None:
    """Raises BudgetError when a policy needs more than the limit, in bytes."""
    if limit is None or peak_bytes <= limit:
        return
    where = solution.replay.peak_at
    raise BudgetError(
        f"policy={policy!r} needs {format_needed(peak_bytes)}, at {where}, more than "
        f"the budget of {format_bytes(limit)}. Raise budget=, or let policy='auto' plan for it.",
        budget_bytes=limit,
        minimum_bytes=peak_bytes,
        where=str(where),
    )


def check_host(solution: Solution, limit: int, whose: str) -> None:
    """Raises HostBudgetError when what somebody has decided needs more host memory than the limit, in bytes."""
    needed = solution.replay.host_bytes
    if needed > limit:
        raise HostBudgetError(
            f"{whose} needs {format_needed(needed)} of host memory, more than host_budget "
            f"({format_bytes(limit)}). Raise host_budget=.",
            budget_bytes=limit,
            minimum_bytes=needed,
            where="host memory",
        )


def blocks(nodes: Sequence[fx.Node]) -> list[Span]:
    """The stretches of nodes that come from one element of an outermost list of modules, in running order."""
    found: dict[str, tuple[int, int]] = {}
    for position, node in enumerate(nodes):
        match = _ELEMENT.match(module_path(node))
        if match:
            first, _ = found.get(match[0], (position, position))
            found[match[0]] = first, position + 1
    spans: list[Span] = []
    for start, stop in sorted(found.values()):
        start = max(start, spans[-1][1]) if spans else start
        if start < stop:
            spans.append((start, stop))
    return spans


def _by_activation(
    policy: Callable[[Activation], Decision | str | None], program: Program, nodes: Sequence[fx.Node], spans: Sequence[Span]
) -> Solution:
    dropped, moved = set(), set()
    for start, stop in spans:
        for p in range(start, stop):
            found = [policy(activation_of(nodes[p], program, v)) for v in program.forward[p].outputs if program.values[v].reads]
            name = f"the policy for {nodes[p].name}"
            wanted = {read_decision(decision, name) for decision in found if decision is not None}
            if Decision.RECOMPUTE in wanted and _may_drop(program, p, stop):
                dropped.add(p)
            elif Decision.OFFLOAD in wanted and _may_move(program, p):
                moved.add(p)
    return _decided(program, frozenset(dropped), frozenset(moved), spans)


def _decided(program: Program, dropped: frozenset[int], moved: frozenset[int], spans: Sequence[Span]) -> Solution:
    """The solution with a policy's decisions, and those of a person before them."""
    again, away = program.pinned(Decision.RECOMPUTE), program.pinned(Decision.OFFLOAD)
    dropped, moved = prune(program, dropped | again), moved | away
    regions = _regions(spans, len(program.forward)) if moved or again else tuple(spans)
    return solution_of(program, dropped, moved, regions)


def _regions(spans: Sequence[Span], end: int) -> tuple[Span, ...]:
    """The spans and all between them: where values move, each op runs in a region, which sees what it saves."""
    edges = sorted({0, end, *(edge for span in spans for edge in span)})
    return tuple(itertools.pairwise(edges))


def _read_from_outside(program: Program, span: Span) -> set[int]:
    """The ops before the span whose results the span reads."""
    inputs = {program.values[v].op for p in range(*span) for v in program.forward[p].inputs}
    return {p for p in inputs if p < span[0]}


def _may_drop(program: Program, position: int, stop: int) -> bool:
    op = program.forward[position]
    stays = all(program.values[v].last_forward < stop for v in op.outputs)
    return stays and op.pin is None and program.may_recompute(position)


def _may_move(program: Program, position: int) -> bool:
    return program.forward[position].pin is None and program.may_move(position)
