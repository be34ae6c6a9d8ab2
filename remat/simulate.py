"""The referee: replay a step under a set of decisions, and say how many bytes are live at each moment.

It decides nothing: the solvers call it, never the other way round.
Recompute is just in time: when backward reads a dropped value, the value and the dropped
inputs it needs are computed then, once, and each is held until its last reader is done.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from remat.program import Move, Program


@dataclass(frozen=True)
class Moment:
    """One op of the replay: `phase` is "forward", "recompute" or "backward"; `live_bytes` is allocated while it runs."""

    phase: str
    name: str
    live_bytes: int
    position: int


class Trip(NamedTuple):
    """A value's way to the host and back, as indices of the schedule: made and copied out at `born`, let go of after
    `release`, copied back from before `reload`, waited for before `use`."""

    value: int
    born: int
    release: int
    reload: int
    use: int


@dataclass(frozen=True)
class Replay:
    """The outcome of one step: peaks and live bytes include what is resident.

    `schedule` lists the ops in running order as (position, is it a recompute), `live_bytes` what is allocated during each.
    `saved_bytes` lie on the device between forward and backward, `host_bytes` on the host. `recompute_us` is the time added by
    computing again, `stall_us` by waiting for copies. `kept` are the values that lie on either, `trips` are in the order in
    which backward wants them, `copies` are (value, is it the way back, start, end) in microseconds from the start of the step.
    """

    program: Program
    schedule: tuple[tuple[int, bool], ...]
    live_bytes: tuple[int, ...]
    saved_bytes: int
    recompute_us: float
    host_bytes: int = 0
    stall_us: float = 0.0
    kept: tuple[int, ...] = ()
    trips: tuple[Trip, ...] = ()
    copies: tuple[tuple[int, bool, float, float], ...] = ()

    @property
    def added_us(self) -> float:
        return self.recompute_us + self.stall_us

    @cached_property
    def peak_bytes(self) -> int:
        return max(self.live_bytes, default=self.program.resident_bytes)

    @cached_property
    def forward_peak_bytes(self) -> int:
        return max(self.live_bytes[: len(self.program.forward)], default=self.program.resident_bytes)

    @cached_property
    def backward_peak_bytes(self) -> int:
        return max(self.live_bytes[len(self.program.forward) :], default=self.program.resident_bytes)

    @cached_property
    def recomputed(self) -> tuple[int, ...]:
        return tuple(position for position, again in self.schedule if again)

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        n = len(self.program.forward)
        return tuple(
            Moment("recompute" if again else "forward" if p < n else "backward", self.program.name_at(p), live, p)
            for (p, again), live in zip(self.schedule, self.live_bytes, strict=True)
        )

    @property
    def peak_at(self) -> Moment:
        return self.moments[max(range(len(self.live_bytes)), key=self.live_bytes.__getitem__)]


def simulate(
    program: Program,
    dropped: Collection[int],
    moves: Mapping[int, Move] | None = None,
    regions: Sequence[tuple[int, int]] = (),
) -> Replay:
    """Replay `program` with the results of the forward ops in `dropped` recomputed, those in `moves` on the host between
    forward and backward, all others saved while needed. `regions` are the stretches [start, stop) of forward that run as one.
    """
    moves = moves or {}
    drop = {v for op in dropped for v in program.forward[op].outputs}
    schedule = _schedule(program, drop)
    when = {position: index for index, (position, again) in enumerate(schedule) if not again}
    n_forward = len(program.forward)
    delta = [0] * (len(schedule) + 1)

    def occupy(born: int, dies: int, size: int) -> None:
        delta[born] += size
        delta[dies + 1] -= size

    for fixed in program.fixed:
        occupy(when[fixed.born], when[fixed.dies], fixed.bytes)
    first_again: dict[int, int] = {}
    last_again: dict[int, int] = {}
    born_again: dict[int, int] = {}
    extra = [0] * len(schedule)
    for index, (position, again) in reversed(list(enumerate(schedule))):
        op = program.forward[position] if position < n_forward else program.backward[position - n_forward]
        extra[index] = op.workspace_bytes
        if not again:
            continue
        read = index
        for v in op.outputs:
            born_again[v] = index
            if program.values[v].passing == 0:  # computed inside each reader, which reads its inputs instead
                release = program.values[v].release
                read = max(read, when[release] if release >= 0 else 0, last_again.get(v, 0))
        for v in op.inputs:
            first_again[v] = index
            last_again[v] = max(last_again.get(v, -1), read)
        if op.state_bytes:  # kept since the first run, and the present state put aside meanwhile
            occupy(when[position], index, op.state_bytes)
            extra[index] += op.state_bytes
    dies = [max(when.get(value.release, -1), last_again.get(v, -1)) for v, value in enumerate(program.values)]
    kept = [v not in drop and last >= n_forward for v, last in enumerate(dies)]
    last_forward = [
        held_until(program, regions, value.op, last)
        for value, last in zip(program.values, _last_forward(program, kept), strict=True)
    ]
    trips: list[Trip] = []
    for v, value in enumerate(program.values):
        move = moves.get(value.op) if kept[v] else None
        if move is not None:
            first_use = min([first_again.get(v, len(schedule)), *(when[p] for p in value.reads)])
            back = first_use if move.reload < 0 else min(first_use, when[move.reload - 1] + 1)
            trips.append(Trip(v, when[value.op], max(when[move.release], when[last_forward[v]]), back, first_use))
            occupy(when[value.op], trips[-1].release, value.bytes)
            occupy(back, dies[v], value.bytes)
            continue
        first_end = max(when[last_forward[v]], dies[v] if kept[v] else 0)
        occupy(when[value.op], first_end, value.bytes if kept[v] else value.passing)
        if v in born_again:
            occupy(born_again[v], max(dies[v], born_again[v]), value.passing)
    host_bytes = sum(program.values[trip.value].bytes for trip in trips)
    saved_bytes = sum(value.bytes for value, stays in zip(program.values, kept, strict=True) if stays) - host_bytes
    live = [base + size + program.resident_bytes for base, size in zip(accumulate(delta[:-1]), extra, strict=True)]
    recomputed = [program.forward[position] for position, again in schedule if again]
    recompute_us = sum(op.cost_us + op.launch_us for op in recomputed)
    trips.sort(key=lambda trip: trip.use)
    stall_us, copies = _transfer(program, schedule, trips)
    return Replay(
        program,
        tuple(schedule),
        tuple(live),
        saved_bytes,
        recompute_us,
        host_bytes,
        stall_us,
        tuple(v for v, stays in enumerate(kept) if stays),
        tuple(trips),
        copies,
    )


def _transfer(
    program: Program, schedule: Sequence[tuple[int, bool]], trips: Sequence[Trip]
) -> tuple[float, tuple[tuple[int, bool, float, float], ...]]:
    """Time lost waiting for copies, and the copies: one lane out, one lane in, each first come, first served."""
    link = program.link
    if not trips or link is None:
        return 0.0, ()
    n_forward = len(program.forward)
    leaving, gone, coming, wanted = (_grouped(trips, at) for at in ("born", "release", "reload", "use"))
    clock = _Clock(link.overlaps)
    out, back = _Lane(False, link.out_us), _Lane(True, link.in_us)
    for index, (position, again) in enumerate(schedule):
        for trip in coming.get(index, ()):
            back.copy(clock, trip.value, program.values[trip.value].bytes, out.ends[trip.value])
        for trip in wanted.get(index, ()):
            clock.wait(back.ends[trip.value])
        op = program.forward[position] if position < n_forward else program.backward[position - n_forward]
        clock.now += op.cost_us + (op.launch_us if again else 0.0)
        for trip in leaving.get(index, ()):
            out.copy(clock, trip.value, program.values[trip.value].bytes)
        for trip in gone.get(index, ()):
            clock.wait(out.ends[trip.value])
    return clock.lost, tuple(sorted((*out.copies, *back.copies), key=lambda copy: copy[2]))


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
    copies: list[tuple[int, bool, float, float]] = field(default_factory=list)

    def copy(self, clock: _Clock, value: int, size: int, after: float = 0.0) -> None:
        start = max(clock.now, self.free, after)
        self.free = self.ends[value] = start + self.copy_us(size)
        self.copies.append((value, self.is_back, start, self.free))
        if not clock.overlaps:
            clock.wait(self.free)


def _grouped(trips: Sequence[Trip], at: str) -> dict[int, list[Trip]]:
    groups: dict[int, list[Trip]] = {}
    for trip in trips:
        groups.setdefault(getattr(trip, at), []).append(trip)
    return groups


def held_until(program: Program, regions: Sequence[tuple[int, int]], op: int, reader: int) -> int:
    """The forward position to which the result of `op` stays, when `reader` is the last to read it: inputs of a region stay to
    its end. A `reader` after forward says that it is never let go of there."""
    if not program.regions_hold or reader >= len(program.forward):
        return reader
    index = bisect_right(regions, reader, key=lambda region: region[0]) - 1
    if index < 0:
        return reader
    start, stop = regions[index]
    return stop - 1 if op < start <= reader < stop else reader


def _last_forward(program: Program, kept: Sequence[bool]) -> list[int]:
    """The last forward position that reads each value; where the reader is computed inside its own readers, theirs."""
    last = [value.last_forward for value in program.values]
    if all(value.passing for value in program.values):
        return last
    for op in reversed(program.forward):
        fused = [last[v] for v in op.outputs if program.values[v].passing == 0 and not kept[v]]
        for v in op.inputs if fused else ():
            last[v] = max(last[v], *fused)
    return last


def _schedule(program: Program, drop: set[int]) -> list[tuple[int, bool]]:
    """Every op in running order, as (position, is it a recompute)."""
    schedule = [(position, False) for position in range(len(program.forward))]
    wanted: dict[int, list[int]] = {}
    for v, value in enumerate(program.values):
        if v in drop and value.reads:
            for position in value.reads:
                wanted.setdefault(position, []).append(v)
    done: set[int] = set()
    for position in range(len(program.forward), len(program.forward) + len(program.backward)):
        for v in wanted.get(position, ()):
            _recompute(program, drop, program.values[v].op, done, schedule)
        schedule.append((position, False))
    return schedule


def _recompute(program: Program, drop: set[int], op: int, done: set[int], schedule: list[tuple[int, bool]]) -> None:
    stack = [op]
    while stack:
        top = stack[-1]
        missing = [program.values[v].op for v in program.forward[top].inputs if v in drop]
        missing = [p for p in missing if p not in done]
        if top not in done and missing:
            stack.extend(reversed(missing))
            continue
        stack.pop()
        if top not in done:
            done.add(top)
            schedule.append((top, True))
