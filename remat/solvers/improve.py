"""Use the room that a plan leaves: stop recomputing single ops where their results fit, dearest per byte first.

Saving a value keeps it from its last forward use until backward would have recomputed it. Where the replay has room for it
all that time, the op need not run twice. The referee has the last word on the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from remat.program import Move, Program
from remat.replay import Replay
from remat.simulate import simulate

_ROUNDS = 4


def improve(
    program: Program,
    dropped: frozenset[int],
    budget_bytes: int,
    moves: Mapping[int, Move] | None = None,
    regions: Sequence[tuple[int, int]] = (),
) -> frozenset[int]:
    """A subset of `dropped` (op positions) that takes no more time and still fits, with `moves` and `regions` as they are."""
    best, replay = dropped, simulate(program, dropped, moves, regions)
    for _ in range(_ROUNDS):
        smaller = prune(program, _fill(program, best, replay, budget_bytes))
        if smaller == best:
            break
        attempt = simulate(program, smaller, moves, regions)
        if attempt.peak_bytes > budget_bytes or attempt.added_us > replay.added_us:
            break
        best, replay = smaller, attempt
    return best


def _fill(program: Program, dropped: frozenset[int], replay: Replay, budget_bytes: int) -> frozenset[int]:
    live = np.array(replay.live_bytes)
    first = {p: i for i, (p, repeated) in enumerate(replay.schedule) if not repeated}
    again = {p: i for i, (p, repeated) in enumerate(replay.schedule) if repeated}
    left = set(dropped)
    free = [p for p in again if _gain(program, p) and program.forward[p].pin is None]
    order = sorted(free, key=lambda p: -_gain(program, p))
    for op in order:
        outputs = [program.values[v] for v in program.forward[op].outputs]
        start = min(first[min(v.last_forward, len(program.forward) - 1)] for v in outputs) + 1
        needed = sum(v.bytes for v in outputs)
        if live[start : again[op]].max(initial=0) + needed <= budget_bytes:
            live[start : again[op]] += needed
            left.discard(op)
    return frozenset(left)


def _gain(program: Program, op: int) -> float:
    total = sum(program.values[v].bytes for v in program.forward[op].outputs)
    return program.forward[op].again_us / max(total, 1)


def prune(program: Program, dropped: frozenset[int], repeats: Collection[int] = ()) -> frozenset[int]:
    """Without the ops whose results nobody asks for again: dropping those means nothing. `repeats` are made again anyway."""
    again = dropped.union(repeats)
    wanted: set[int] = set()
    stack = [op for op in again if any(program.values[v].reads for v in program.forward[op].outputs)]
    while stack:
        op = stack.pop()
        if op in wanted:
            continue
        wanted.add(op)
        stack.extend(program.values[v].op for v in program.forward[op].inputs if program.values[v].op in again)
    return dropped.intersection(wanted)
