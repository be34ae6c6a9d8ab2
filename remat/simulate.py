"""The referee: replay a step under a set of decisions, and say how many bytes are live at each moment.

It decides nothing: the solvers call it, never the other way round.
Recompute is just in time: when backward reads a dropped value, the value and the dropped
inputs it needs are computed then, and each is held until its last reader is done, or until its next one has it computed once
more (`remat.schedule`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from remat.link import Trip, timing
from remat.program import KINDS, Move, Program, held_until
from remat.replay import Replay, Span, Spans
from remat.schedule import Stay, make_schedule

_OUTPUTS, _ACTIVATIONS, _WORKING_SET = (KINDS.index(kind) for kind in ("outputs", "activations", "working set"))


def simulate(
    program: Program,
    dropped: Collection[int],
    moves: Mapping[int, Move] | None = None,
    regions: Sequence[tuple[int, int]] = (),
    repeats: Mapping[int, int] | None = None,
) -> Replay:
    """Replay `program` with the results of the forward ops in `dropped` recomputed, those in `moves` on the host between
    forward and backward, all others saved while needed. `regions` are the stretches [start, stop) of forward that run as one.
    `repeats` says of ops how often their results are let go of before their last reader (`remat.schedule`).
    """
    moves = moves or {}
    step = _lives(program, dropped, regions, repeats or {})
    travelling = [v for v in step.kept_values if program.values[v].op in moves] if moves else []
    trips = {v: _trip(step, v, moves[program.values[v].op]) for v in travelling}
    spans = _spans(step, trips)
    in_order = sorted(trips.values(), key=lambda trip: trip.use)
    host_bytes = sum(program.values[v].bytes for v in trips)
    return Replay(
        program,
        tuple(step.entries),
        tuple(_live_bytes(step, spans)),
        int(program.value_table.bytes[step.kept].sum()) - host_bytes,
        sum(program.forward[step.entries[index][0]].again_us for index in step.runs_again),
        host_bytes,
        timing(program, step.entries, in_order).lost_us if trips else 0.0,
        tuple(step.kept_values),
        tuple(in_order),
        spans,
    )


class _Lives(NamedTuple):
    """The values of a step under some decisions. Those in `gone` are of dropped ops. By value: `dies` is where backward last
    reads what forward made, -1 for never; `kept` whether it is held for that; `leaves` where forward is done with it; `stays`
    when a repeated one is there. All are indices of the schedule's `entries`: `when` is that of each position,
    `runs_again` those of recomputed ops."""

    program: Program
    gone: frozenset[int]
    entries: list[tuple[int, bool]]
    runs_again: list[int]
    stays: dict[int, list[Stay]]
    when: np.ndarray
    again: _Again
    dies: np.ndarray
    kept: np.ndarray
    leaves: np.ndarray

    @property
    def kept_values(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.kept).tolist()
        return found


def _lives(
    program: Program, dropped: Collection[int], regions: Sequence[tuple[int, int]], repeats: Mapping[int, int]
) -> _Lives:
    values = program.value_table
    gone = frozenset(v for op in dropped for v in program.forward[op].outputs)
    made = make_schedule(program, dropped, repeats)
    runs_again = [index for index, (_, is_again) in enumerate(made.entries) if is_again]
    is_first = np.ones(len(made.entries), dtype=bool)
    is_first[runs_again] = False
    when = np.flatnonzero(is_first)  # first runs are in the order of positions
    again = _again(program, made.entries, runs_again, when)
    dies = np.where(values.release >= 0, when[values.release], -1)
    for v, last in again.last.items():
        dies[v] = max(dies[v], last)
    kept = dies >= len(program.forward)
    kept[list(gone)] = False
    leaves = when[held_until(program, regions, values.op, _last_forward(program, kept))]
    return _Lives(program, gone, made.entries, runs_again, made.stays, when, again, dies, kept, leaves)


def _trip(step: _Lives, v: int, move: Move) -> Trip:
    """A value's way to the host and back."""
    value, when = step.program.values[v], step.when
    first_use = min([step.again.first.get(v, len(step.entries)), *(int(when[p]) for p in value.reads)])
    back = first_use if move.reload < 0 else min(first_use, int(when[move.reload - 1]) + 1)
    return Trip(v, int(when[value.op]), max(int(when[move.release]), int(step.leaves[v])), back, first_use)


def _spans(step: _Lives, trips: Mapping[int, Trip]) -> Spans:
    """Every storage's stays on the device."""
    program, when, again = step.program, step.when, step.again
    values, (born, dies, sizes) = program.value_table, program.fixed_table
    size = np.where(step.kept, values.bytes, values.passing)
    until = np.maximum(step.leaves, np.where(step.kept, step.dies, 0))
    more = list(_random_states(step))
    for v in {**step.stays, **again.born}:
        stays = _stays(step, v)
        if stays and v not in step.gone:
            until[v] = max(step.leaves[v], stays.pop(0)[1])
        more += [Span(start, end, int(values.passing[v]), "recomputed", v) for start, end in stays]
    for v, trip in trips.items():
        more.append(Span(trip.reload, int(step.dies[v]), int(values.bytes[v]), "activations", v))
        until[v] = trip.release
    fixed_until = when[dies]
    _write_over(step, trips, size, until, fixed_until)
    kinds = np.where(program.is_output, _OUTPUTS, np.where(step.kept, _ACTIVATIONS, _WORKING_SET))
    rest = np.array([(s.born, s.dies, s.bytes, KINDS.index(s.kind), s.value) for s in more], dtype=np.int64).reshape(-1, 5)
    n = len(program.values)
    return Spans(
        np.concatenate((when[born], when[values.op], rest[:, 0])),
        np.concatenate((fixed_until, until, rest[:, 1])),
        np.concatenate((sizes, size, rest[:, 2])),
        np.concatenate((program.fixed_kinds, kinds, rest[:, 3])),
        np.concatenate((np.full(len(born), -1), np.arange(n), rest[:, 4])),
    )


def _stays(step: _Lives, v: int) -> list[tuple[int, int]]:
    """First and last index of each of a value's stays in backward."""
    dies, born = int(step.dies[v]), step.again.born.get(v)
    if repeated := step.stays.get(v):
        return [(stay.born, max(stay.last, dies) if stay.is_last else stay.last) for stay in repeated]
    return [] if born is None else [(born, max(dies, born))]


def _write_over(step: _Lives, trips: Mapping[int, Trip], size: np.ndarray, until: np.ndarray, fixed_until: np.ndarray) -> None:
    """An op may be written over the first of the values that it is the last to read: that value's span then ends one moment
    earlier."""
    values, fixed = step.program.values, step.program.fixed
    written = [(values[v].over, values[v].op) for v in step.program.writing if size[v] and v not in trips]
    for over, position in (*written, *((f.over, f.born) for f in fixed if f.over)):
        index = step.when[position]
        for v in over:
            held = v in trips or (step.kept[v] and (v in step.stays or v in step.again.beside))
            if size[v] and not held and until[v] == index:
                until[v] = index - 1
                break


class _Again(NamedTuple):
    """Of values in recomputed ops, indices of the schedule: where each is first and last read, and where it is made. Those in
    `beside` are what stored ones are made of."""

    first: dict[int, int]
    last: dict[int, int]
    born: dict[int, int]
    beside: set[int]


def _again(program: Program, schedule: Sequence[tuple[int, bool]], runs_again: Sequence[int], when: np.ndarray) -> _Again:
    found = _Again({}, {}, {}, set())
    for index in reversed(runs_again):
        op, read = program.forward[schedule[index][0]], index
        if any(program.values[v].passing or v in found.beside for v in op.outputs):
            found.beside.update(op.inputs)
        for v in op.outputs:
            found.born[v] = index
            if program.values[v].passing == 0:  # computed inside each reader, which reads its inputs instead
                release = program.values[v].release
                read = max(read, int(when[release]) if release >= 0 else 0, found.last.get(v, 0))
        for v in op.inputs:
            found.first[v] = index
            found.last[v] = max(found.last.get(v, -1), read)
    return found


def _random_states(step: _Lives) -> Iterator[Span]:
    """Those of recomputed ops, from the first run to the second, and the present one, put aside meanwhile."""
    for index in step.runs_again:
        position = step.entries[index][0]
        size = step.program.forward[position].state_bytes
        if size:
            yield Span(int(step.when[position]), index, size, "activations")
            yield Span(index, index, size, "working set")


def _live_bytes(step: _Lives, spans: Spans) -> list[int]:
    """What is allocated during each op."""
    program, length = step.program, len(step.entries)
    scratch = np.zeros(length, dtype=np.int64)
    scratch[step.when] = program.scratch_bytes
    scratch[step.runs_again] = program.scratch_bytes[[step.entries[index][0] for index in step.runs_again]]
    begins, ends = (np.bincount(at, spans.bytes, length + 1) for at in (spans.born, spans.dies + 1))
    held = np.cumsum((begins - ends)[:-1].astype(np.int64))  # sums of bytes are exact as floats, up to petabytes
    live: list[int] = (held + scratch + program.resident_bytes).tolist()
    return live


def _last_forward(program: Program, kept: np.ndarray) -> np.ndarray:
    """The last forward position that reads each value; where the reader is computed inside its own readers, theirs."""
    if not program.fused:
        return program.value_table.last_forward
    last = program.value_table.last_forward.tolist()
    for op in program.fused:
        fused = [last[v] for v in op.outputs if program.values[v].passing == 0 and not kept[v]]
        for v in op.inputs if fused else ():
            last[v] = max(last[v], *fused)
    return np.array(last)
