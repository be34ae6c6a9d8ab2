"""When the values that go to the host leave the device and when they come back.

Copies out start as soon as a value is made and queue on one lane; the device memory is let go of at the first forward op
that ends after the copy does. Copies back queue on another lane and start as late as still hides them, at one of the moments
in backward when something can be started. Where copies do not overlap with compute they wait for nothing: out at the last
reader in forward, back when the first reader asks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np

from remat.program import Move, Program, held_until
from remat.replay import Replay
from remat.simulate import simulate


def timetable(
    program: Program, dropped: Collection[int], offloaded: Collection[int], regions: Sequence[tuple[int, int]]
) -> dict[int, Move]:
    """A `Move` for each op position in `offloaded`.

    regions: the stretches [start, stop) of forward positions that run as one.
    """
    ops = np.array(sorted(offloaded), dtype=np.int64)
    last = (max(program.values[v].last_forward for v in program.forward[op].outputs) for op in ops)
    releases = held_until(program, regions, ops, np.maximum(np.fromiter(last, np.int64), ops))
    moves = dict(zip(ops.tolist(), map(Move, releases.tolist()), strict=True))
    if program.link is None or not program.link.overlaps or not program.moments:
        return moves
    replay = simulate(program, dropped, moves, regions)
    ends = list(accumulate(_times(program, replay)))
    return _come_back(program, replay, ends, _leave(program, replay, ends, moves))


def _times(program: Program, replay: Replay) -> list[float]:
    n = len(program.forward)
    ops = [(program.forward[p] if p < n else program.backward[p - n], again) for p, again in replay.schedule]
    return [op.again_us if again else op.cost_us for op, again in ops]


def _leave(program: Program, replay: Replay, ends: Sequence[float], moves: dict[int, Move]) -> dict[int, Move]:
    assert program.link is not None
    n = len(program.forward)
    wanted = {trip.value for trip in replay.trips}
    free, later = 0.0, {}
    for op, move in sorted(moves.items()):
        moved = [program.values[v].bytes for v in program.forward[op].outputs if v in wanted]
        free = max(free, ends[op]) + sum(map(program.link.out_us, moved))
        later[op] = move._replace(release=max(move.release, min(bisect_left(ends, free, 0, n), n - 1)))
    return later


def _come_back(program: Program, replay: Replay, ends: Sequence[float], moves: dict[int, Move]) -> dict[int, Move]:
    assert program.link is not None
    when = {position: index for index, (position, again) in enumerate(replay.schedule) if not again}
    starts = sorted({p for p, _ in program.moments})
    moments = [ends[when[p - 1]] for p in starts]
    free = float("inf")
    found: dict[int, int] = {}
    for trip in reversed(replay.trips):
        value = program.values[trip.value]
        free = min(free, ends[trip.use - 1]) - program.link.in_us(value.bytes)
        start = starts[max(bisect_right(moments, free) - 1, 0)]
        found[value.op] = min(start, found.get(value.op, start))
    return {op: move._replace(reload=found.get(op, -1)) for op, move in moves.items()}
