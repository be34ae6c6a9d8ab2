"""Better plans value by value: undo some decisions, make it fit again in the cheapest way, keep what is faster.

The selection along the depth of a model is near the optimum where blocks are many; where they are few, the convex hull of
each is too coarse. This is a large neighbourhood search (Shaw 1998) with the simulator as the judge of every step. What is
dropped to fit is chosen as DTR evicts (Kirisame et al. 2021), by time per byte at the highest moment, but looking ahead:
together with what would otherwise be kept for nothing but to recompute it. Or its results are let go of between two of their
readers, and computed once more (`remat.schedule`). Nothing is moved to the host.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from remat.program import Decision, Program
from remat.simulate import simulate
from remat.solvers.improve import prune
from remat.solvers.moves import Found, Moves

EFFORT = 300_000  # ops replayed by one search: about half a second
_TRIED, _MOST = 10, 40  # groups replayed at each step towards fitting, and where none of them helps
_SKIPPED = 0.3  # of the groups at a random step
_IDLE = 30  # steps without a gain after which the search ends


def search(
    program: Program,
    dropped: frozenset[int],
    budget_bytes: int,
    regions: Sequence[tuple[int, int]] = (),
    repeats: Mapping[int, int] | None = None,
    effort: int = EFFORT,
) -> Found:
    """Decisions that fit and take no more time than those given, which fit; the same for the same arguments each time."""
    task = _Task(program, budget_bytes, regions, effort)
    best = task.trimmed(task.replayed(dropped, repeats or {}))
    fresh = task.fitted(task.replayed(program.pinned(Decision.RECOMPUTE), {}), frozenset())
    if fresh is not None:
        best = min(best, task.trimmed(fresh), key=_time_us)
    idle = 0
    for undone, dice in task.undoings(best):
        if task.left <= 0 or idle > _IDLE or not best.decided:
            break
        idle += 1
        undone &= best.decided
        other = task.fitted(task.without(best, undone), undone, dice)
        if other is None:
            continue
        other = task.trimmed(other)
        if _time_us(other) < _time_us(best) - 1e-6:
            idle = 0
        if _time_us(other) <= _time_us(best):
            best = other
    return best


def shrunk(program: Program, dropped: frozenset[int], regions: Sequence[tuple[int, int]] = (), effort: int = EFFORT) -> Found:
    """Decisions with a peak at most that of `dropped`, in steps of a hundredth, as long as one is found."""
    task = _Task(program, 0, regions, effort)
    best = task.replayed(dropped, {})
    while task.left > 0:
        above = best.replay.peak_bytes - program.resident_bytes
        task.budget_bytes = best.replay.peak_bytes - max(above // 100, 1)
        smaller = task.fitted(best, frozenset())
        if smaller is None:
            break
        best = smaller
    return best


def meant(
    program: Program, dropped: frozenset[int], repeats: Mapping[int, int], regions: Sequence[tuple[int, int]] = ()
) -> Found:
    """Decisions without those that mean nothing."""
    while True:
        dropped = prune(program, dropped, repeats)
        if program.saved_stay:
            repeats = {p: times for p, times in repeats.items() if p in dropped}
        replay = simulate(program, dropped, None, regions, repeats)
        if not repeats:
            return Found(dropped, {}, replay)
        runs = Counter(replay.recomputed)
        fewer = {p: min(times, runs[p] - (p in dropped)) for p, times in repeats.items() if runs[p] > (p in dropped)}
        if fewer == repeats:
            return Found(dropped, repeats, replay)
        repeats = fewer


def _time_us(found: Found) -> float:
    return found.replay.recompute_us


@dataclass
class _Task:
    """A program, what it has to fit in, and how many ops may still be replayed on the way."""

    program: Program
    budget_bytes: int
    regions: Sequence[tuple[int, int]]
    left: int
    fixed: frozenset[int] = field(init=False)
    moves: Moves = field(init=False)
    seen: dict[Hashable, Found] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moves = Moves(self.program)
        kept = (Decision.SAVE, Decision.OFFLOAD)
        self.fixed = frozenset(
            p for p, op in enumerate(self.program.forward) if op.pin in kept or not self.program.may_recompute(p)
        )

    def replayed(self, dropped: frozenset[int], repeats: Mapping[int, int]) -> Found:
        """Counted again each time, though the same decisions, which come up often in small programs, are replayed once."""
        decisions = dropped, frozenset(repeats.items())
        if decisions not in self.seen:
            self.seen[decisions] = meant(self.program, dropped, repeats, self.regions)
        found = self.seen[decisions]
        self.left -= len(found.replay.schedule)
        return found

    def without(self, found: Found, undone: frozenset[int]) -> Found:
        """With the results of these ops saved."""
        return self.replayed(found.dropped - undone, {p: times for p, times in found.repeats.items() if p not in undone})

    def excess(self, found: Found) -> int:
        """Bytes over the budget, summed over the moments of the step."""
        return sum(live - self.budget_bytes for live in found.replay.live_bytes if live > self.budget_bytes)

    def undoings(self, start: Found) -> Iterator[tuple[frozenset[int], random.Random | None]]:
        """Sets of dropped ops to save instead: each alone, dearest first, then random ones."""
        free = [p for p, op in enumerate(self.program.forward) if p not in self.fixed and op.pin is None]
        for p in sorted(start.decided.intersection(free), key=lambda p: -self.program.forward[p].again_us):
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
            over = self.excess(found)
            helps: list[tuple[bool, float, int, Found]] = []
            for count, move in enumerate(self.moves.towards(found, self.fixed | kept)[:_MOST]):
                if count >= _TRIED and helps:
                    break
                if dice is not None and dice.random() < _SKIPPED:
                    continue
                other = self.replayed(found.dropped | move.dropped, {**found.repeats, **dict(move.repeats)})
                left = self.excess(other)
                price = (_time_us(other) - _time_us(found)) / max(over - left, 1)
                if left < over:
                    helps.append((left > 0, price, len(helps), other))  # what fits at once comes first
            if not helps:
                return None
            found = min(helps)[3]
        return found

    def trimmed(self, found: Found) -> Found:
        """With decisions undone that are not needed to fit, dearest first."""
        again = True
        while again:
            again = False
            for other in self._undone(found):
                if self.left <= 0:
                    return found
                if other.replay.peak_bytes <= self.budget_bytes and _time_us(other) < _time_us(found) - 1e-9:
                    found, again = other, True
                    break
        return found

    def _undone(self, found: Found) -> Iterator[Found]:
        """With one decision less: an op's results saved, made again once less, or kept until backward first asks for them."""
        for p in sorted(found.decided, key=lambda p: -self.program.forward[p].again_us):
            if self.program.forward[p].pin is not None:
                continue
            yield self.without(found, frozenset([p]))
            if p in found.repeats:
                yield self.replayed(found.dropped, {**found.repeats, p: found.repeats[p] - 1})
                if p in found.dropped:
                    yield self.replayed(found.dropped - {p}, found.repeats)
