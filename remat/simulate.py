"""The referee: replay a step under a set of decisions, and say how many bytes are live at each moment.

It decides nothing: the solvers call it, never the other way round.
Recompute is just in time: when backward reads a dropped value, the value and the dropped
inputs it needs are computed then, once, and each is held until its last reader is done.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from remat.program import Program


@dataclass(frozen=True)
class Moment:
    """One op of the replay: `phase` is "forward", "recompute" or "backward"; `live_bytes` is allocated while it runs."""

    phase: str
    name: str
    live_bytes: int
    position: int


@dataclass(frozen=True)
class Replay:
    """The outcome of one step: peaks and live bytes include what is resident; `recompute_us` is the time added.

    `schedule` lists the ops in running order as (position, is it a recompute), `live_bytes` what is allocated during each.
    """

    program: Program
    schedule: tuple[tuple[int, bool], ...]
    live_bytes: tuple[int, ...]
    saved_bytes: int
    recompute_us: float

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


def simulate(program: Program, dropped: Collection[int]) -> Replay:
    """Replay `program` with the results of the forward ops in `dropped` recomputed, all others saved while needed."""
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
    last_again: dict[int, int] = {}
    born_again: dict[int, int] = {}
    extra = [0] * len(schedule)
    for index, (position, again) in enumerate(schedule):
        op = program.forward[position] if position < n_forward else program.backward[position - n_forward]
        extra[index] = op.workspace_bytes
        if not again:
            continue
        for v in op.inputs:
            last_again[v] = index
        for v in op.outputs:
            born_again[v] = index
        if op.state_bytes:  # kept since the first run, and the present state put aside meanwhile
            occupy(when[position], index, op.state_bytes)
            extra[index] += op.state_bytes
    saved_bytes = 0
    for v, value in enumerate(program.values):
        release = when[value.release] if value.release >= 0 else -1
        dies = max(release, last_again.get(v, -1))
        if v in drop:
            occupy(when[value.op], when[value.last_forward], value.passing)
            if v in born_again:
                occupy(born_again[v], max(dies, born_again[v]), value.passing)
            continue
        kept = dies >= n_forward
        occupy(when[value.op], max(dies, when[value.last_forward]), value.bytes if kept else value.passing)
        if kept:
            saved_bytes += value.bytes
    live = [base + size + program.resident_bytes for base, size in zip(accumulate(delta[:-1]), extra, strict=True)]
    recomputed = [program.forward[position] for position, again in schedule if again]
    recompute_us = sum(op.cost_us + op.launch_us for op in recomputed)
    return Replay(program, tuple(schedule), tuple(live), saved_bytes, recompute_us)


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
