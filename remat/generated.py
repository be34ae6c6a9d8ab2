"""The step that Inductor's generated code takes: the allocations of its two halves on one timeline.

Bytes are those of the code. The time of each moment is the cost model's for the node that it is named after; each half takes as
long as planned.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from remat.describe import resident_storages
from remat.inductor_memory import Memory
from remat.plan import Block, Plan, Storage
from remat.replay import Moment, Replay, Span, by_kind


@dataclass(frozen=True)
class GeneratedStep:
    """Forward and backward, and the nodes whose results the caller of the model holds."""

    forward: Memory
    backward: Memory
    held: Collection[str] = ()

    @property
    def peak_bytes(self) -> int:
        """Above what is resident."""
        return max(map(sum, _by_kind(self.storages(), len(self.names))))

    @property
    def names(self) -> tuple[str, ...]:
        """What each moment allocates for."""
        return (*self.forward.moments, *self.backward.moments)

    def storages(self) -> Iterator[Storage]:
        """What is allocated, with moments of forward first; modules are left open."""
        first = len(self.forward.moments)
        last = len(self.names) - 1
        taken = {a.name: a for a in self.backward.allocations if a.born == 0}
        for made in self.forward.allocations:
            over = [taken.pop(name) for name in dict.fromkeys(made.results) if name in taken]
            kind, dies = "working set", made.dies
            if made.results and (not over or any(name in self.held for name in made.results)):
                kind, dies = "outputs", last
            elif made.results:
                kind, dies = "activations", first + max(a.dies for a in over)
            yield Storage(made.name, kind, made.bytes, made.born, dies, "")
        for made in self.backward.allocations:
            if made.born or made.name in taken:
                kind = "gradients" if made.results else "working set"
                yield Storage(made.name, kind, made.bytes, first + made.born, first + made.dies, "")


def as_generated(plan: Plan, replay: Replay, step: GeneratedStep, slack_bytes: int) -> Plan:
    """The plan of `replay`, with the timeline of its generated code."""
    program, last = replay.program, len(step.names) - 1
    position = {op.name: p for p, op in enumerate((*program.forward, *program.backward))}
    where = [position.get(name, -1) for name in step.names]
    halves = [False] * len(step.forward.moments) + [True] * len(step.backward.moments)
    again = [is_backward and 0 <= p < len(program.forward) for p, is_backward in zip(where, halves, strict=True)]
    phases = ["recompute" if a else "backward" if b else "forward" for a, b in zip(again, halves, strict=True)]
    modules = [program.module_at(p) if p >= 0 else "" for p in where]

    storages = [*resident_storages(program, last), Storage("slack", "working set", slack_bytes, 0, last, "")]
    for storage in step.storages():
        is_again = again[storage.born] and storage.kind == "working set"
        storages.append(storage._replace(kind="recomputed" if is_again else storage.kind, module=modules[storage.born]))

    rows = _by_kind(storages, len(phases))
    times = _times(replay, where, len(step.forward.moments))
    names = [name or f"start of {phase}" for name, phase in zip(step.names, phases, strict=True)]
    columns = zip(phases, names, modules, map(sum, rows), times, times[1:], rows, strict=False)
    timeline = tuple(map(Moment._make, columns))
    starts = [moment.start_us for moment in timeline]
    return dataclasses.replace(
        plan,
        peak_bytes=max(moment.live_bytes for moment in timeline),
        timeline=timeline,
        storages=tuple(storages),
        blocks=tuple(_moved(block, [bisect_left(starts, start) for start, _ in replay.timing.ops]) for block in plan.blocks),
    )


def _by_kind(storages: Iterable[Storage], length: int) -> list[tuple[int, ...]]:
    table = by_kind((Span(s.born, s.dies, s.bytes, s.kind) for s in storages), length)
    return list(map(tuple, table.tolist()))


def _times(replay: Replay, where: Sequence[int], n_forward: int) -> list[float]:
    """When each moment starts, and the end of the step: either half takes the time that it takes in `replay`."""
    program, ops = replay.program, replay.timing.ops
    costs = [program.op_at(p).cost_us if p >= 0 else 0.0 for p in where]
    middle, end = ops[len(program.forward)][0], ops[-1][1]
    times = [0.0]
    for half, until in ((costs[:n_forward], middle), (costs[n_forward:], end)):
        start, total = times[-1], sum(half) or 1.0
        times += [start + (until - start) * done / total for done in accumulate(half)]
        times[-1] = until
    return times


def _moved(block: Block, at: Sequence[int]) -> Block:
    """A block whose activations are idle at other moments; `at` is the new one for each old one."""
    activations = (dataclasses.replace(a, idle=(at[a.idle[0]], at[a.idle[1]])) for a in block.activations)
    return dataclasses.replace(block, activations=tuple(activations))
