"""What `remat.simulate` says of a step: how many bytes are live at each moment, and for what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from remat.link import Timing, Trip, timing
from remat.program import KINDS, RESIDENT, Program


class Moment(NamedTuple):
    """One op of the replay: `phase` is "forward", "loss" (outside of the model), "recompute" or "backward"; `live_bytes` is
    allocated while it runs, and `by_kind` says for what, in the order of `KINDS`. Times are in microseconds from the start of
    the step. `module` made the value, or the one whose gradient this is for."""

    phase: str
    name: str
    module: str
    live_bytes: int
    start_us: float
    end_us: float
    by_kind: tuple[int, ...]

    @property
    def is_backward(self) -> bool:
        return self.phase in ("recompute", "backward")

    def __str__(self) -> str:
        of = f" of {self.module}" if self.module else ""
        return f"{self.name}{of} ({self.phase})"


class Span(NamedTuple):
    """A storage's stay on the device, by indices of the schedule, both included. `value` is -1 for one that is not a value."""

    born: int
    dies: int
    bytes: int
    kind: str
    value: int = -1


@dataclass(frozen=True)
class Spans:
    """Storages' stays as arrays, an entry for each; iterates over them as `Span`. `kinds` are indices of `KINDS`."""

    born: np.ndarray
    dies: np.ndarray
    bytes: np.ndarray
    kinds: np.ndarray
    values: np.ndarray

    def __iter__(self) -> Iterator[Span]:
        columns = (column.tolist() for column in (self.born, self.dies, self.bytes, self.kinds, self.values))
        for born, dies, size, kind, value in zip(*columns, strict=True):
            yield Span(born, dies, size, KINDS[kind], value)


@dataclass(frozen=True)
class Replay:
    """The outcome of one step: peaks and live bytes include what is resident.

    `schedule` lists the ops in running order as (position, is it a recompute), `live_bytes` what is allocated during each.
    `saved_bytes` lie on the device between forward and backward, `host_bytes` on the host. `recompute_us` is the time added by
    computing again, `stall_us` by waiting for copies. `kept` are the values that lie on either, `trips` are in the order in
    which backward wants them. `spans` add up to `live_bytes`, with what is resident and the scratch memory of kernels.
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
    spans: Iterable[Span] = field(default=(), repr=False, compare=False)

    @property
    def added_us(self) -> float:
        return self.recompute_us + self.stall_us

    @cached_property
    def peak_bytes(self) -> int:
        return max(self.live_bytes, default=self.program.resident_bytes)

    def room(self, limit_bytes: int) -> dict[str, int]:
        """Bytes between what is live and a limit, while each op of backward or recomputed there runs."""
        found: dict[str, int] = {}
        for (position, _), live in list(zip(self.schedule, self.live_bytes, strict=True))[len(self.program.forward) :]:
            name = self.program.op_at(position).name
            found[name] = min(limit_bytes - live, found.get(name, limit_bytes))
        return found

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
    def timing(self) -> Timing:
        return timing(self.program, self.schedule, self.trips)

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        program, n = self.program, len(self.program.forward)
        return tuple(
            Moment(
                "recompute" if again else "forward" if p < n else "loss" if p < n + program.loss_ops else "backward",
                program.op_at(p).name,
                program.module_at(p),
                live,
                *times,
                kinds,
            )
            for (p, again), live, times, kinds in zip(
                self.schedule, self.live_bytes, self.timing.ops, self._by_kind(), strict=True
            )
        )

    def _by_kind(self) -> list[tuple[int, ...]]:
        """For each moment its bytes, in the order of `KINDS`."""
        table = by_kind(self.spans, len(self.schedule))
        table[:, : len(RESIDENT)] += [dict(self.program.resident).get(kind, 0) for kind in RESIDENT]
        table[:, KINDS.index("others")] += self.program.resident_bytes - sum(size for _, size in self.program.resident)
        table[:, -1] += np.array(self.live_bytes, dtype=np.int64) - table.sum(axis=1)  # scratch memory of kernels
        return list(map(tuple, table.tolist()))

    @property
    def peak_at(self) -> Moment:
        return self.moments[max(range(len(self.live_bytes)), key=self.live_bytes.__getitem__)]


def by_kind(spans: Iterable[Span], length: int) -> np.ndarray:
    """Bytes at each of `length` moments: a row for each, a column for each of `KINDS`."""
    table = np.zeros((length + 1, len(KINDS)), dtype=np.int64)
    for span in spans:
        column = KINDS.index(span.kind)
        table[span.born, column] += span.bytes
        table[span.dies + 1, column] -= span.bytes
    return table.cumsum(axis=0)[:-1]
