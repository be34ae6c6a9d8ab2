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
from remat.program import HELD, Move, Program, held_until
from remat.replay import Replay, Span
from remat.schedule import Stay, make_schedule


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
    travelling = [v for v, value in enumerate(program.values) if step.kept[v] and value.op in moves]
    trips = {v: _trip(step, v, moves[program.values[v].op]) for v in travelling}
    spans = _spans(step, trips)
    in_order = sorted(trips.values(), key=lambda trip: trip.use)
    recomputed = [program.forward[position] for position, is_again in step.entries if is_again]
    host_bytes = sum(program.values[v].bytes for v in trips)
    return Replay(
        program,
        tuple(step.entries),
        tuple(_live_bytes(program, step.entries, spans)),
        sum(value.bytes for value, is_kept in zip(program.values, step.kept, strict=True) if is_kept) - host_bytes,
        sum(op.again_us for op in recomputed),
        host_bytes,
        timing(program, step.entries, in_order).lost_us if trips else 0.0,
        tuple(v for v, is_kept in enumerate(step.kept) if is_kept),
        tuple(in_order),
        tuple(spans),
    )


class _Lives(NamedTuple):
    """The values of a step under some decisions. Those in `gone` are of dropped ops. By value: `dies` is where backward last
    reads what forward made, -1 for never; `kept` whether it is held for that; `leaves` where forward is done with it; `stays`
    when a repeated one is there. All are indices of the schedule's `entries`; `when` has the index of each position."""

    program: Program
    gone: frozenset[int]
    entries: list[tuple[int, bool]]
    stays: dict[int, list[Stay]]
    when: dict[int, int]
    again: _Again
    dies: list[int]
    kept: list[bool]
    leaves: list[int]


def _lives(
    program: Program, dropped: Collection[int], regions: Sequence[tuple[int, int]], repeats: Mapping[int, int]
) -> _Lives:
    gone = frozenset(v for op in dropped for v in program.forward[op].outputs)
    made = make_schedule(program, dropped, repeats)
    when = {position: index for index, (position, is_again) in enumerate(made.entries) if not is_again}
    again = _again(program, made.entries, when)
    dies = [max(when.get(value.release, -1), again.last.get(v, -1)) for v, value in enumerate(program.values)]
    kept = [v not in gone and last >= len(program.forward) for v, last in enumerate(dies)]
    readers = zip(program.values, _last_forward(program, kept), strict=True)
    leaves = [when[held_until(program, regions, value.op, last)] for value, last in readers]
    return _Lives(program, gone, made.entries, made.stays, when, again, dies, kept, leaves)


def _trip(step: _Lives, v: int, move: Move) -> Trip:
    """A value's way to the host and back."""
    value, when = step.program.values[v], step.when
    first_use = min([step.again.first.get(v, len(step.entries)), *(when[p] for p in value.reads)])
    back = first_use if move.reload < 0 else min(first_use, when[move.reload - 1] + 1)
    return Trip(v, when[value.op], max(when[move.release], step.leaves[v]), back, first_use)


def _spans(step: _Lives, trips: Mapping[int, Trip]) -> list[Span]:
    """Every storage's stays on the device."""
    program, when = step.program, step.when
    spans = [Span(when[f.born], when[f.dies], f.bytes, f.kind) for f in program.fixed]
    spans += _random_states(program, step.entries, when)
    open_to: dict[int, int] = {}  # by value its span, if something may be written over it
    for v, value in enumerate(program.values):
        if v in trips:
            spans.append(Span(trips[v].born, trips[v].release, value.bytes, "activations", v))
            spans.append(Span(trips[v].reload, step.dies[v], value.bytes, "activations", v))
            continue
        born, is_kept, stays = when[value.op], step.kept[v], _stays(step, v)
        kept_until = stays.pop(0)[1] if stays and v not in step.gone else step.dies[v] if is_kept else 0
        kind = "outputs" if value.pinned == HELD else "activations" if is_kept else "working set"
        size = value.bytes if is_kept else value.passing
        if size:
            _write_over(spans, open_to, value.over, born)
            if not (is_kept and (v in step.stays or v in step.again.beside)):
                open_to[v] = len(spans)
        spans.append(Span(born, max(step.leaves[v], kept_until), size, kind, v))
        spans += [Span(start, end, value.passing, "recomputed", v) for start, end in stays]
    for fixed in program.fixed:
        _write_over(spans, open_to, fixed.over, when[fixed.born])
    return spans


def _stays(step: _Lives, v: int) -> list[tuple[int, int]]:
    """First and last index of each of a value's stays in backward."""
    dies, born = step.dies[v], step.again.born.get(v)
    if repeated := step.stays.get(v):
        return [(stay.born, max(stay.last, dies) if stay.is_last else stay.last) for stay in repeated]
    return [] if born is None else [(born, max(dies, born))]


def _write_over(spans: list[Span], open_to: Mapping[int, int], over: Sequence[int], index: int) -> None:
    """The op at `index` may be written over the first of the values in `over` that it is the last to read: that value's span
    then ends one moment earlier."""
    for at in (open_to[v] for v in over if v in open_to):
        if spans[at].dies == index:
            spans[at] = spans[at]._replace(dies=index - 1)
            return


class _Again(NamedTuple):
    """Of values in recomputed ops, indices of the schedule: where each is first and last read, and where it is made. Those in
    `beside` are what stored ones are made of."""

    first: dict[int, int]
    last: dict[int, int]
    born: dict[int, int]
    beside: set[int]


def _again(program: Program, schedule: Sequence[tuple[int, bool]], when: Mapping[int, int]) -> _Again:
    found = _Again({}, {}, {}, set())
    for index in reversed([i for i, (_, is_again) in enumerate(schedule) if is_again]):
        op, read = program.forward[schedule[index][0]], index
        if any(program.values[v].passing or v in found.beside for v in op.outputs):
            found.beside.update(op.inputs)
        for v in op.outputs:
            found.born[v] = index
            if program.values[v].passing == 0:  # computed inside each reader, which reads its inputs instead
                release = program.values[v].release
                read = max(read, when[release] if release >= 0 else 0, found.last.get(v, 0))
        for v in op.inputs:
            found.first[v] = index
            found.last[v] = max(found.last.get(v, -1), read)
    return found


def _random_states(program: Program, schedule: Sequence[tuple[int, bool]], when: Mapping[int, int]) -> Iterator[Span]:
    """Those of recomputed ops, from the first run to the second, and the present one, put aside meanwhile."""
    for index, (position, is_again) in enumerate(schedule):
        size = program.forward[position].state_bytes if is_again else 0
        if size:
            yield Span(when[position], index, size, "activations")
            yield Span(index, index, size, "working set")


def _live_bytes(program: Program, schedule: Sequence[tuple[int, bool]], spans: Sequence[Span]) -> list[int]:
    """What is allocated during each op."""
    delta = [0] * (len(schedule) + 1)
    for span in spans:
        delta[span.born] += span.bytes
        delta[span.dies + 1] -= span.bytes
    scratch = program.scratch_bytes[[position for position, _ in schedule]]
    live: list[int] = (np.cumsum(delta[:-1]) + scratch + program.resident_bytes).tolist()
    return live


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
