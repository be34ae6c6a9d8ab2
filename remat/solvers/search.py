"""Better plans value by value: undo some decisions, make it fit again in the cheapest way, keep what is faster.

The selection along the depth of a model is near the optimum where blocks are many; where they are few, the convex hull of
each is too coarse. This is a large neighbourhood search (Shaw 1998) with the simulator as the judge of every step. What is
dropped to fit is chosen as DTR evicts (Kirisame et al. 2021), by time per byte at the highest moment, but looking ahead:
together with what would otherwise be kept for nothing but to recompute it. A value is recomputed once at most, and nothing is
moved to the host.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from remat.program import Decision, Op, Program
from remat.simulate import Replay, simulate
from remat.solvers.improve import prune

EFFORT = 300_000  # ops replayed by one search: about half a second
_TRIED = 10  # groups replayed at each step towards fitting
_DEPTH = 4  # how many ops back a group may reach
_SKIPPED = 0.3  # of the groups at a random step
_IDLE = 30  # steps without a gain after which the search ends


class Found(NamedTuple):
    """A set of dropped ops and its replay."""

    dropped: frozenset[int]
    replay: Replay


def search(
    program: Program,
    dropped: frozenset[int],
    budget_bytes: int,
    regions: Sequence[tuple[int, int]] = (),
    effort: int = EFFORT,
) -> frozenset[int]:
    """Ops to drop that fit and take no more time than `dropped`, which fits; the same for the same arguments each time."""
    task = _Task(program, budget_bytes, regions, effort)
    best = task.trimmed(task.replayed(dropped))
    fresh = task.fitted(task.replayed(program.pinned(Decision.RECOMPUTE)), frozenset())
    if fresh is not None:
        best = min(best, task.trimmed(fresh), key=_time_us)
    idle = 0
    for undone, dice in task.undoings(best):
        if task.left <= 0 or idle > _IDLE or not best.dropped:
            break
        idle += 1
        undone &= best.dropped
        other = task.fitted(task.replayed(best.dropped - undone), undone, dice)
        if other is None:
            continue
        other = task.trimmed(other)
        if _time_us(other) < _time_us(best) - 1e-6:
            idle = 0
        if _time_us(other) <= _time_us(best):
            best = other
    return best.dropped


def shrunk(
    program: Program, dropped: frozenset[int], regions: Sequence[tuple[int, int]] = (), effort: int = EFFORT
) -> frozenset[int]:
    """Ops to drop with a peak at most that of `dropped`, in steps of a hundredth, as long as one is found."""
    task = _Task(program, 0, regions, effort)
    best = task.replayed(dropped)
    while task.left > 0:
        above = best.replay.peak_bytes - program.resident_bytes
        task.budget_bytes = best.replay.peak_bytes - max(above // 100, 1)
        smaller = task.fitted(best, frozenset())
        if smaller is None:
            break
        best = smaller
    return best.dropped


def _time_us(found: Found) -> float:
    return found.replay.recompute_us


def _us(op: Op) -> float:
    return op.cost_us + op.launch_us


@dataclass
class _Task:
    """A program, what it has to fit in, and how many ops may still be replayed on the way."""

    program: Program
    budget_bytes: int
    regions: Sequence[tuple[int, int]]
    left: int
    fixed: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        kept = (Decision.SAVE, Decision.OFFLOAD)
        self.fixed = frozenset(
            p
            for p, op in enumerate(self.program.forward)
            if not op.outputs or op.pin in kept or any(self.program.values[v].pinned for v in op.outputs)
        )

    def replayed(self, dropped: frozenset[int]) -> Found:
        dropped = prune(self.program, dropped)
        replay = simulate(self.program, dropped, None, self.regions)
        self.left -= len(replay.schedule)
        return Found(dropped, replay)

    def excess(self, found: Found) -> int:
        """Bytes over the budget, summed over the moments of the step."""
        return sum(live - self.budget_bytes for live in found.replay.live_bytes if live > self.budget_bytes)

    def undoings(self, start: Found) -> Iterator[tuple[frozenset[int], random.Random | None]]:
        """Sets of dropped ops to save instead: each alone, dearest first, then random ones."""
        free = [p for p, op in enumerate(self.program.forward) if p not in self.fixed and op.pin is None]
        for p in sorted(start.dropped.intersection(free), key=lambda p: -_us(self.program.forward[p])):
            yield frozenset([p]), None
        dice = random.Random(0)
        while free:
            share = dice.random()
            yield frozenset(p for p in free if dice.random() < share**2), dice

    def fitted(self, found: Found, kept: frozenset[int], dice: random.Random | None = None) -> Found | None:
        """With more dropped until it fits, but none of `kept`; None when nothing helps."""
        while found.replay.peak_bytes > self.budget_bytes:
            if self.left <= 0:
                return None
            groups = self._groups(found, self.fixed | kept)[:_TRIED]
            over = self.excess(found)
            tried: list[tuple[bool, float, int, Found]] = []
            for group in groups:
                if dice is not None and dice.random() < _SKIPPED:
                    continue
                other = self.replayed(found.dropped | group)
                left = self.excess(other)
                price = (_time_us(other) - _time_us(found)) / max(over - left, 1)
                if left < over:
                    tried.append((left > 0, price, len(tried), other))  # what fits at once comes first
            if not tried:
                return None
            found = min(tried)[3]
        return found

    def trimmed(self, found: Found) -> Found:
        """With ops that need not be dropped to fit saved again, dearest first."""
        again = True
        while again:
            again = False
            for p in sorted(found.dropped, key=lambda p: -_us(self.program.forward[p])):
                if self.left <= 0:
                    return found
                if self.program.forward[p].pin is not None:
                    continue
                other = self.replayed(found.dropped - {p})
                if other.replay.peak_bytes <= self.budget_bytes and _time_us(other) < _time_us(found) - 1e-9:
                    found, again = other, True
                    break
        return found

    def _groups(self, found: Found, kept: frozenset[int]) -> list[frozenset[int]]:
        """Sets of ops whose dropping frees memory at the highest moment, by time per byte."""
        program, replay = self.program, found.replay
        highest = max(range(len(replay.live_bytes)), key=replay.live_bytes.__getitem__)
        first = {p: i for i, (p, again) in enumerate(replay.schedule) if not again}
        uses: dict[int, list[int]] = {}
        for i, (p, again) in enumerate(replay.schedule):
            for v in program.forward[p].inputs if again else ():
                uses.setdefault(v, []).append(i)
        priced = []
        for p, op in enumerate(program.forward):
            if p in found.dropped or p in kept or first[p] >= highest:
                continue
            freed = 0
            for v in op.outputs:
                asked = [*(first[q] for q in program.values[v].reads), *uses.get(v, ())]
                if asked and first[program.values[v].last_forward] < highest < min(asked):
                    freed += program.values[v].bytes
            if freed:
                priced += [
                    (sum(_us(program.forward[q]) for q in group) / freed, sorted(group))
                    for group in self._around(p, found, kept)
                ]
        return [frozenset(group) for _, group in sorted(priced)]

    def _around(self, p: int, found: Found, kept: frozenset[int]) -> Iterator[frozenset[int]]:
        """Op p, and with it what it is computed from: first what would be kept for that alone, then more."""
        group = frozenset([p])
        for _ in range(_DEPTH):
            yield group
            before = {self.program.values[v].op for q in group for v in self.program.forward[q].inputs}
            before -= group | found.dropped | kept
            before = {q for q in before if self._is_mostly_unread(q)} or before
            if not before:
                return
            group |= before

    def _is_mostly_unread(self, p: int) -> bool:
        """True if backward reads less than half of what the op writes."""
        outputs = [self.program.values[v] for v in self.program.forward[p].outputs]
        return 2 * sum(v.bytes for v in outputs if v.reads) < sum(v.bytes for v in outputs)
