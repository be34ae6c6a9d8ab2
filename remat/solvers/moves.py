"""Steps of the search towards a plan that fits: what frees memory where a plan needs most of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from remat.program import Op, Program
from remat.replay import Replay
from remat.schedule import unpacking

_DEPTH = 4  # how many ops back a group may reach


class Found(NamedTuple):
    """A set of dropped ops, how often results are let go of before their last reader, and the replay of both."""

    dropped: frozenset[int]
    repeats: Mapping[int, int]
    replay: Replay

    @property
    def decided(self) -> frozenset[int]:
        """The ops that something is decided about."""
        return self.dropped.union(self.repeats)


class Move(NamedTuple):
    """A step towards fitting: more ops to drop, and how often one's results are let go of."""

    dropped: frozenset[int] = frozenset()
    repeats: tuple[tuple[int, int], ...] = ()


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


class Moves:
    """The steps that a program allows."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.repeatable = repeatable(program)

    def towards(self, found: Found, kept: frozenset[int]) -> list[Move]:
        """What frees memory at the highest moment, by time per byte."""
        program, replay = self.program, found.replay
        highest = max(range(len(replay.live_bytes)), key=replay.live_bytes.__getitem__)
        uses = _Uses(program, replay)
        priced: list[tuple[float, Move]] = []
        for p, op in enumerate(program.forward):
            if p in kept:
                continue
            freed = 0 if p in found.dropped else uses.freed_bytes(op, highest, is_saved=True)
            for group in self._around(p, found, kept) if freed else ():
                us = sum(program.forward[q].again_us for q in group)
                priced.append((us / freed, Move(group)))
                gone = self._gone_between(group, found, uses)
                if gone:
                    us += sum(program.forward[q].again_us for q, _ in gone)
                    priced.append((us / freed, Move(group, gone)))
            freed = uses.freed_bytes(op, highest, is_saved=False) if p in self.repeatable else 0
            rounds = uses.rounds(op, highest)
            more = rounds - found.repeats.get(p, 0)
            for group in self._around(p, found, kept) if freed and more > 0 else ():
                more_dropped = (group if program.saved_stay else group - {p}) - found.dropped
                us = more * op.again_us + sum(program.forward[q].again_us for q in more_dropped)
                rounds_of = ((q, max(rounds, found.repeats.get(q, 0))) for q in sorted(group & self.repeatable))
                priced.append((us / freed, Move(more_dropped, tuple(rounds_of))))
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
