"""When each op and each copy to the host and back runs: compute is one lane, either way of the link another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from remat.program import Link, Program

_NO_LINK = Link(1.0, 1.0, overlaps=True)


class Trip(NamedTuple):
    """A value's way to the host and back, as indices of the schedule: made and copied out at `born`, let go of after
    `release`, copied back from before `reload`, waited for before `use`."""

    value: int
    born: int
    release: int
    reload: int
    use: int


class Copy(NamedTuple):
    """One way of a trip; microseconds from the start of the step."""

    value: int
    is_back: bool
    start_us: float
    end_us: float


class Timing(NamedTuple):
    """Start and end of each op of a schedule, time lost waiting, and the copies by their start; in microseconds."""

    ops: tuple[tuple[float, float], ...]
    lost_us: float
    copies: tuple[Copy, ...]


def timing(program: Program, schedule: Sequence[tuple[int, bool]], trips: Sequence[Trip]) -> Timing:
    """Run the schedule against the clock. Each lane is first come, first served. Without a link copies take no time."""
    link = program.link or _NO_LINK
    trips = trips if program.link else ()
    leaving, gone, coming, wanted = (_grouped(trips, at) for at in ("born", "release", "reload", "use"))
    clock = _Clock(link.overlaps)
    out, back = _Lane(False, link.out_us), _Lane(True, link.in_us)
    ops: list[tuple[float, float]] = []
    for index, (position, again) in enumerate(schedule):
        for trip in coming.get(index, ()):
            back.copy(clock, trip.value, program.values[trip.value].bytes, out.ends[trip.value])
        for trip in wanted.get(index, ()):
            clock.wait(back.ends[trip.value])
        op = program.op_at(position)
        start = clock.now
        clock.now += op.again_us if again else op.cost_us
        ops.append((start, clock.now))
        for trip in leaving.get(index, ()):
            out.copy(clock, trip.value, program.values[trip.value].bytes)
        for trip in gone.get(index, ()):
            clock.wait(out.ends[trip.value])
    copies = sorted((*out.copies, *back.copies), key=lambda copy: copy.start_us)
    return Timing(tuple(ops), clock.lost, tuple(copies))


@dataclass
class _Clock:
    """The time that compute has come to, and what of it was lost waiting."""

    overlaps: bool
    now: float = 0.0
    lost: float = 0.0

    def wait(self, until: float) -> None:
        if until > self.now:
            self.lost, self.now = self.lost + until - self.now, until


@dataclass
class _Lane:
    """One way of the link: copies in order, each after the one before it."""

    is_back: bool
    copy_us: Callable[[int], float]
    free: float = 0.0
    ends: dict[int, float] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def copy(self, clock: _Clock, value: int, size: int, after: float = 0.0) -> None:
        start = max(clock.now, self.free, after)
        self.free = self.ends[value] = start + self.copy_us(size)
        self.copies.append(Copy(value, self.is_back, start, self.free))
        if not clock.overlaps:
            clock.wait(self.free)


def _grouped(trips: Sequence[Trip], at: str) -> dict[int, list[Trip]]:
    groups: dict[int, list[Trip]] = {}
    for trip in trips:
        groups.setdefault(getattr(trip, at), []).append(trip)
    return groups
