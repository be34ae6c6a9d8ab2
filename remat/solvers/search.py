"""Better plans value by value: undo some decisions, make it fit again in the cheapest way, keep what is faster.

The selection along the depth of a model is near the optimum where blocks are many; where they are few, the convex hull of
each is too coarse. This is a large neighbourhood search (Shaw 1998) with the simulator as the judge of every step. What is
dropped to fit is chosen as DTR evicts (Kirisame et al. 2021), by time per byte at the highest moment, but looking ahead:
together with what would otherwise be kept for nothing but to recompute it. Or its results are let go of between two of their
readers, and computed once more (`remat.schedule`). Nothing is moved to the host.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from remat.program import Decision, Op, Program
from remat.schedule import unpacking
from remat.simulate import Replay, simulate
from remat.solvers.improve import prune

EFFORT = 300_000  # ops replayed by one search: about half a second
_TRIED = 10  # groups replayed at each step towards fitting
_DEPTH = 4  # how many ops back a group may reach
_SKIPPED = 0.3  # of the groups at a random step
_IDLE = 30  # steps without a gain after which the search ends


class Found(NamedTuple):
    """A set of dropped ops, how often results are let go of before their last reader, and the replay of both."""

    dropped: frozenset[int]
    repeats: Mapping[int, int]
    replay: Replay

    @property
    def decided(self) -> frozenset[int]:
        """The ops that something is decided about."""
        return self.dropped.union(self.repeats)


class _Move(NamedTuple):
    """A step towards fitting: more ops to drop, and how often one's results are let go of."""

    dropped: frozenset[int] = frozenset()
    repeats: tuple[tuple[int, int], ...] = ()


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


def repeatable(program: Program) -> frozenset[int]:
    """Ops whose results may be let go of between two of their readers: each is in memory only for what reads it there."""
    ends = [*unpacking(program), len(program.forward) + len(program.backward)]
    fused = {v for op in program.forward if any(not program.values[w].passing for w in op.outputs) for v in op.inputs}
    found = set()
    for p, op in enumerate(program.forward):
        values = [program.values[v] for v in op.outputs]
        goes = all(not v.reads or v.release < ends[bisect_right(ends, max(v.reads))] for v in values)
        makes = all(v.passing and not v.pinned for v in values)
        if values and goes and makes and fused.isdisjoint(op.outputs) and op.pin is None and not op.state_bytes:
            found.add(p)
    return frozenset(found)


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
    repeatable: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.repeatable = repeatable(self.program)
        kept = (Decision.SAVE, Decision.OFFLOAD)
        self.fixed = frozenset(
            p
            for p, op in enumerate(self.program.forward)
            if not op.outputs or op.pin in kept or any(self.program.values[v].pinned for v in op.outputs)
        )

    def replayed(self, dropped: frozenset[int], repeats: Mapping[int, int]) -> Found:
        found = meant(self.program, dropped, repeats, self.regions)
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
        for p in sorted(start.decided.intersection(free), key=lambda p: -_us(self.program.forward[p])):
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
            tried: list[tuple[bool, float, int, Found]] = []
            for move in self._moves(found, self.fixed | kept)[:_TRIED]:
                if dice is not None and dice.random() < _SKIPPED:
                    continue
                other = self.replayed(found.dropped | move.dropped, {**found.repeats, **dict(move.repeats)})
                left = self.excess(other)
                price = (_time_us(other) - _time_us(found)) / max(over - left, 1)
                if left < over:
                    tried.append((left > 0, price, len(tried), other))  # what fits at once comes first
            if not tried:
                return None
            found = min(tried)[3]
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
        for p in sorted(found.decided, key=lambda p: -_us(self.program.forward[p])):
            if self.program.forward[p].pin is not None:
                continue
            yield self.without(found, frozenset([p]))
            if p in found.repeats:
                yield self.replayed(found.dropped, {**found.repeats, p: found.repeats[p] - 1})
                if p in found.dropped:
                    yield self.replayed(found.dropped - {p}, found.repeats)

    def _moves(self, found: Found, kept: frozenset[int]) -> list[_Move]:
        """What frees memory at the highest moment, by time per byte."""
        program, replay = self.program, found.replay
        highest = max(range(len(replay.live_bytes)), key=replay.live_bytes.__getitem__)
        uses = _Uses(program, replay)
        priced: list[tuple[float, _Move]] = []
        for p, op in enumerate(program.forward):
            if p in kept:
                continue
            freed = 0 if p in found.dropped else uses.freed_bytes(op, highest, is_saved=True)
            for group in self._around(p, found, kept) if freed else ():
                us = sum(_us(program.forward[q]) for q in group)
                priced.append((us / freed, _Move(group)))
                gone = self._gone_between(group, found, uses)
                if gone:
                    us += sum(_us(program.forward[q]) for q, _ in gone)
                    priced.append((us / freed, _Move(group, gone)))
            freed = uses.freed_bytes(op, highest, is_saved=False) if p in self.repeatable else 0
            rounds = uses.rounds(op, highest)
            more = rounds - found.repeats.get(p, 0)
            for group in self._around(p, found, kept) if freed and more > 0 else ():
                more_dropped = (group if program.saved_stay else group - {p}) - found.dropped
                us = more * _us(op) + sum(_us(program.forward[q]) for q in more_dropped)
                rounds_of = ((q, max(rounds, found.repeats.get(q, 0))) for q in sorted(group & self.repeatable))
                priced.append((us / freed, _Move(more_dropped, tuple(rounds_of))))
        return [move for _, move in sorted(priced, key=lambda pair: (pair[0], sorted(pair[1].dropped), pair[1].repeats))]

    def _gone_between(self, group: frozenset[int], found: Found, uses: _Uses) -> tuple[tuple[int, int], ...]:
        """What a group is computed from, let go of between that and its own readers: op, how often."""
        program = self.program
        reads = [q for p in group for v in program.forward[p].outputs for q in program.values[v].reads]
        if not reads:
            return ()
        at = uses.when[min(reads)]
        gone = []
        for q in {program.values[v].op for p in group for v in program.forward[p].inputs} & self.repeatable:
            op = program.forward[q]
            rounds = uses.rounds(op, at) + 1
            if rounds > found.repeats.get(q, 0) and uses.is_read_after(op, at):
                gone.append((q, rounds))
        return tuple(sorted(gone))

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


class _Uses:
    """When backward, or a recompute in it, reads each value: indices of the schedule."""

    def __init__(self, program: Program, replay: Replay) -> None:
        self.program = program
        self.when = {p: i for i, (p, again) in enumerate(replay.schedule) if not again}
        self._round = list(range(len(replay.schedule)))  # the position that each index is for
        for i in reversed(range(len(replay.schedule) - 1)):
            if replay.schedule[i][1]:
                self._round[i] = self._round[i + 1]
        self._times: dict[int, list[int]] = {}
        for v, value in enumerate(program.values):
            if value.reads:
                self._times[v] = [self.when[p] for p in value.reads]
        for i, (p, again) in enumerate(replay.schedule):
            for v in program.forward[p].inputs if again else ():
                self._times.setdefault(v, []).append(i)

    def freed_bytes(self, op: Op, at: int, is_saved: bool) -> int:
        """Of an op's results what lies unread at an index: since forward, or since a reader in backward."""
        return sum(self.program.values[v].bytes for v in op.outputs if self._is_idle(v, at, is_saved))

    def _is_idle(self, v: int, at: int, is_saved: bool) -> bool:
        times = self._times.get(v)
        if not times or max(times) <= at or at in times:
            return False
        if is_saved:
            return self.when[self.program.values[v].last_forward] < at < min(times)
        return min(times) < at

    def rounds(self, op: Op, before: int) -> int:
        """For how many positions of backward something reads the op's results before an index."""
        return len({self._round[i] for v in op.outputs for i in self._times.get(v, ()) if i < before})

    def is_read_after(self, op: Op, at: int) -> bool:
        return any(self._round[i] > at for v in op.outputs for i in self._times.get(v, ()))
