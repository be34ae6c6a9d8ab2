"""The order in which a step runs under a set of decisions, and how long each result of an op stays that runs again and again.

Backward asks for values position by position. All that a position lacks is computed just before it, inputs first. What has been
dropped and made again stays for its later readers, but for *repeated* ops: with `repeats[op] = k`, the first k times that its
results have been of use in a position, they are let go of and made again when next asked for. (Several computations of one
value, as in rotor, Checkmate and MOCCASIN; the first time may be that of forward, where the op is not dropped.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from remat.program import Program


@dataclass
class Stay:
    """A repeated value's time on the device, by indices of the schedule. `is_last`: it is held to its end, as others are."""

    born: int
    last: int
    is_last: bool


@dataclass
class Schedule:
    """`entries` are the ops in running order as (position, is it a recompute); `stays` those of the results of repeated ops."""

    entries: list[tuple[int, bool]]
    stays: dict[int, list[Stay]] = field(default_factory=dict)


def make_schedule(program: Program, dropped: Collection[int], repeats: Mapping[int, int]) -> Schedule:
    """Every op of the step in running order. `dropped` and `repeats` are of forward ops."""
    return _Scheduler(program, dropped, repeats).run()


def unpacking(program: Program) -> list[int]:
    """The backward positions at which values are read, in order. Between two of them an op of autograd runs."""
    return [position for position, _ in program.unpacked]


class _Scheduler:
    def __init__(self, program: Program, dropped: Collection[int], repeats: Mapping[int, int]) -> None:
        self.program, self.again = program, {*dropped, *repeats}
        self.left = dict(repeats)
        self.done = self.again.difference(dropped)
        self.used: set[int] = set()
        self.schedule = Schedule(program.running_order[: len(program.forward)])
        for op in self.done:
            self._begin(op, op)

    def run(self) -> Schedule:
        program, entries, done = self.program, self.schedule.entries, len(self.program.forward)
        ends = unpacking(program) if self.left else []
        for position, reads in program.unpacked:
            values = [v for v in reads if program.values[v].op in self.again]
            if not values:
                continue
            entries += program.running_order[done:position]
            done = position
            for v in values:
                self._compute(program.values[v].op)
            index = len(entries)
            for v in values if self.left else ():
                after = bisect_right(ends, position)
                until = ends[after] if after < len(ends) else len(program.running_order)
                self._read(v, index + until - 1 - position)
            self._let_go(index)
        entries += program.running_order[done:]
        return self.schedule

    def _let_go(self, index: int) -> None:
        """Of what has been of use for the entry at an index, before it runs, and is to be made again."""
        for op in self.used:
            if not self.left[op]:
                continue
            self.left[op] -= 1
            self.done.discard(op)
            for v in self.program.forward[op].outputs:
                stay = self.schedule.stays[v][-1]
                if stay.last == op:  # of forward, and of no use so far: it goes together with those that were
                    stay.last = index - 1
        self.used.clear()

    def _compute(self, op: int) -> None:
        """Put an op into the schedule unless its results are there, what it lacks before it."""
        program, stack = self.program, [op]
        while stack:
            top = stack[-1]
            if top in self.done:
                stack.pop()
                continue
            sources = (program.values[v].op for v in program.forward[top].inputs)
            missing = [p for p in sources if p in self.again and p not in self.done]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            self.done.add(top)
            index = len(self.schedule.entries)
            self.schedule.entries.append((top, True))
            if self.left:
                for v in program.forward[top].inputs:
                    self._read(v, index)
                if top in self.left:
                    self._begin(top, index)
                    self.used.add(top)

    def _begin(self, op: int, index: int) -> None:
        for v in self.program.forward[op].outputs:
            self.schedule.stays.setdefault(v, []).append(Stay(index, index, not self.left[op]))

    def _read(self, v: int, index: int) -> None:
        if v in self.schedule.stays:
            self.schedule.stays[v][-1].last = index
            self.used.add(self.program.values[v].op)
