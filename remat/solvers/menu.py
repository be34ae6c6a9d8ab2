"""A block's menu: ways to run it, from "save everything" to "save its input only", each with what it costs.

A block is a stretch of forward positions between two cuts and the backward positions that belong to it, sliced out of the
step as a small `Program`. Values that leave the block are saved. Blocks with equal slices share one menu, so that the
layers of a deep model are solved once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from remat.program import Decision, Fixed, Move, Op, Program, Value
from remat.simulate import simulate
from remat.solvers.mincut import Items, Network, closure, hull

_SHARES = (0.25, 0.5, 0.75, 1.0)
_LEAVES = "leaves the block"
_WORTH = 1e-6  # of all bytes: what recompute that takes no time has to save


@dataclass(frozen=True)
class Option:
    """One way to run a block. `dropped` and `offloaded` are op positions within the slice.

    saved_bytes stay on the device from the block's forward to its backward, host_bytes on the host, in as many copies as
    n_moved; forward_bytes and backward_bytes are what the block adds to what was saved before it while it runs.
    """

    dropped: frozenset[int]
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    recompute_us: float
    offloaded: frozenset[int] = frozenset()
    host_bytes: int = 0
    n_moved: int = 0


def block_keys(program: Program, cuts: Sequence[int], back: Sequence[int], reach: int) -> list[Hashable]:
    """A key for each block between cuts: stretches of up to `reach` blocks with equal keys have equal slices.

    Places are (block, position in it), blocks counted from the one the key is for. What is `reach` blocks away or more is
    outside of every stretch, where slices do not tell one place from another.
    """
    places = _places(program, cuts, back)
    parts: list[list[Hashable]] = [[] for _ in cuts[:-1]]

    def place(p: int, k: int) -> tuple[int, int]:
        block, position = places[p]
        return (block - k, position) if abs(block - k) < reach else (reach if block > k else -reach, 0)

    for p, op in enumerate(program.forward):
        k = places[p][0]
        inputs = []
        for v in op.inputs:
            maker = program.values[v].op
            inputs.append((place(maker, k), program.forward[maker].outputs.index(v)))
        outputs = []
        for value in (program.values[v] for v in op.outputs):
            ends = (value.last_forward, *value.reads, *((value.release,) if value.release >= 0 else ()))
            marks = tuple(place(q, k) for q in ends)
            under = tuple(place(program.values[u].op, k) for u in value.over)
            outputs.append((value.bytes, value.passing_bytes, value.pinned, value.release >= 0, marks, under))
        parts[k].append((op.cost_us, op.workspace_bytes, op.launch_us, op.state_bytes, op.pin, tuple(inputs), tuple(outputs)))
    for p, op in enumerate(program.backward, len(program.forward)):
        if p < back[0]:
            parts[places[p][0]].append(op.workspace_bytes)
    for fixed in sorted(program.fixed):
        for k in {places[fixed.born][0], places[fixed.dies][0]}:
            if k < len(parts):
                under = tuple(place(program.values[u].op, k) for u in fixed.over)
                parts[k].append((place(fixed.born, k), place(fixed.dies, k), fixed.bytes, under))
    return [tuple(part) for part in parts]


def _places(program: Program, cuts: Sequence[int], back: Sequence[int]) -> list[tuple[int, int]]:
    """(block, position in it) of every position; backward positions of a block are negative, and what follows is in none."""
    places = [(k, p - start) for k, (start, stop) in enumerate(pairwise(cuts)) for p in range(start, stop)]
    for k in range(len(cuts) - 2, -1, -1):
        places += [(k, p - back[k]) for p in range(back[k + 1], back[k])]
    total = len(program.forward) + len(program.backward)
    return places + [(len(cuts) + total, 0)] * (total - len(places))


def outside_bytes(program: Program, start: int, stop: int, back_start: int, back_stop: int) -> tuple[int, int]:
    """What is live all through a block's forward, and all through its backward, besides it (gradients of later layers)."""
    born, dies, size = program.fixed_table
    forward = size[(born < start) & (dies >= stop)].sum()
    backward = size[(born < back_start) & (dies >= back_stop)].sum()
    return int(forward), int(backward)


def slice_program(program: Program, start: int, stop: int, back_start: int, back_stop: int) -> Program:
    """The block of forward positions [start, stop) and backward positions [back_start, back_stop) on its own."""
    length = stop - start

    def place(p: int) -> int:
        return min(max(p - start, 0), length - 1) if p < stop else length + min(max(p - back_start, 0), back_stop - back_start)

    inside = [v for op in program.forward[start:stop] for v in op.outputs]
    index = {v: i for i, v in enumerate(inside)}
    ops = tuple(
        op._replace(
            name="",
            inputs=tuple(index[v] for v in op.inputs if v in index),
            outputs=tuple(index[v] for v in op.outputs),
        )
        for op in program.forward[start:stop]
    )
    values = []
    for v in inside:
        value = program.values[v]
        leaves = value.last_forward >= stop
        values.append(
            Value(
                "",
                value.bytes,
                value.op - start,
                min(value.last_forward, stop - 1) - start,
                tuple(place(p) for p in value.reads),
                place(value.release) if value.release >= 0 else (length + back_stop - back_start if leaves else -1),
                value.pinned or (_LEAVES if leaves else ""),
                value.passing_bytes,
                tuple(index[u] for u in value.over if u in index),
            )
        )
    fixed: list[Fixed] = []
    born, dies, size = program.fixed_table
    around = (born < start) & (dies >= stop)
    for k in np.flatnonzero((born < stop) & (dies >= start) & ~around):
        fixed.append(Fixed(place(max(int(born[k]), start)), place(min(int(dies[k]), stop - 1)), int(size[k])))
    around = (born < back_start) & (dies >= back_stop)
    for k in np.flatnonzero((born < back_stop) & (dies >= max(back_start, len(program.forward))) & ~around):
        over = tuple(index[u] for u in program.fixed[k].over if u in index) if born[k] >= back_start else ()
        at = place(max(int(born[k]), back_start)), place(min(int(dies[k]), back_stop - 1))
        fixed.append(Fixed(*at, int(size[k]), over=over))
    backward = tuple(Op("", 0.0, op.workspace_bytes) for op in _backward_ops(program, back_start, back_stop))
    return Program(ops, (*backward, Op("", 0.0, 0)), tuple(values), tuple(sorted(fixed)), 0)


def _backward_ops(program: Program, start: int, stop: int) -> tuple[Op, ...]:
    n = len(program.forward)
    return program.backward[start - n : stop - n]


def make_menu(block: Program, least_bytes: int | None = None) -> tuple[Option, ...]:
    """The block's options, none of them worse than another in every respect.

    least_bytes: with a number, values of at least that size may move to the host; None: nothing moves.
    """
    items, positions = _items(block)
    candidates: set[frozenset[int]] = set()
    for recomputed in hull(items):
        again, _ = closure(items, recomputed)
        candidates.add(frozenset(positions[v] for v in again) | block.pinned(Decision.RECOMPUTE))
    always = block.pinned(Decision.OFFLOAD)
    options = [_option(block, dropped, always) for dropped in candidates]
    if least_bytes is not None:
        options += [_option(block, d, moved | always) for d in candidates for moved in _movable(block, d, least_bytes)]
    kept = [o for o in options if not any(_better(other, o) for other in options)]
    return tuple(sorted(kept, key=lambda o: o.recompute_us))


def recomputed_for_nothing(program: Program) -> frozenset[int]:
    """The ops, of those that take no time to run again, whose recompute leaves the fewest bytes saved."""
    items, positions = _items(program)
    takes_time = (program.forward[p].again_us > 0 and program.forward[p].pin is not Decision.RECOMPUTE for p in positions)
    banned = [banned or costs for banned, costs in zip(items.banned, takes_time, strict=True)]
    gain = sum(items.bytes) * _WORTH
    free = replace(items, cost_us=[gain] * len(positions), banned=banned)
    again, _ = closure(free, Network(free).cheapest(1.0))
    return frozenset(positions[v] for v in again)


def _movable(block: Program, dropped: frozenset[int], least_bytes: int) -> set[frozenset[int]]:
    """Sets of ops whose results could move: those that leave the block, and those made first, up to shares of the bytes."""
    replay = simulate(block, dropped)
    sizes: dict[int, int] = {}
    leaving = set()
    for value in (block.values[v] for v in replay.kept):
        if value.bytes >= least_bytes and not value.is_output and block.forward[value.op].pin is None:
            sizes[value.op] = sizes.get(value.op, 0) + value.bytes
            if value.pinned == _LEAVES:
                leaving.add(value.op)
    found = {frozenset(leaving)}
    for share in _SHARES:
        moved, total = set[int](), 0
        for op in sorted(sizes):
            if total < share * sum(sizes.values()):
                moved.add(op)
                total += sizes[op]
        found.add(frozenset(moved))
    return found - {frozenset()}


def _option(block: Program, dropped: frozenset[int], offloaded: frozenset[int]) -> Option:
    moves = {op: Move(max(block.values[v].last_forward for v in block.forward[op].outputs)) for op in offloaded}
    replay = simulate(block, dropped, moves)
    return Option(
        dropped,
        replay.saved_bytes,
        replay.forward_peak_bytes,
        replay.backward_peak_bytes,
        replay.recompute_us,
        offloaded,
        replay.host_bytes,
        len(replay.trips),
    )


def _better(a: Option, b: Option) -> bool:
    first = (a.saved_bytes, a.forward_bytes, a.backward_bytes, a.recompute_us, a.host_bytes, a.n_moved)
    second = (b.saved_bytes, b.forward_bytes, b.backward_bytes, b.recompute_us, b.host_bytes, b.n_moved)
    return first != second and all(x <= y for x, y in zip(first, second, strict=True))


def _items(block: Program) -> tuple[Items, list[int]]:
    positions = [p for p, op in enumerate(block.forward) if op.outputs]
    index = {p: i for i, p in enumerate(positions)}
    outputs = [[block.values[v] for v in block.forward[p].outputs] for p in positions]
    return (
        Items(
            bytes=[
                max(sum(v.bytes for v in vs if v.reads), max(v.bytes for v in vs) if not any(v.reads for v in vs) else 0)
                for vs in outputs
            ],
            cost_us=[block.forward[p].again_us for p in positions],
            inputs=[[index[block.values[v].op] for v in block.forward[p].inputs] for p in positions],
            needed=[any(v.reads for v in vs) for vs in outputs],
            banned=[
                any(v.pinned for v in vs) or block.forward[p].pin in (Decision.SAVE, Decision.OFFLOAD)
                for p, vs in zip(positions, outputs, strict=True)
            ],
        ),
        positions,
    )
