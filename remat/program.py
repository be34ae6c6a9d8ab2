"""One training step as numbers: what the solvers choose on and the simulator replays.

A `Program` is a line of positions: forward ops first, then backward ops. Memory is counted by storage, so views do not
appear. Three kinds of storage occupy it:

- `Value`: written by a forward op. Saved, or dropped after its last forward use and recomputed in backward.
- `Fixed`: anything whose lifetime no decision moves (gradients, temporaries of an op, outputs of the model).
- resident: parameters, buffers, inputs; one number.

A dropped value is recomputed at the first backward position that reads it, its dropped inputs first, and each is held
until the last reader is done. That is what the runtime of door 1 and the partitioned graphs of door 2 both do.
No torch in here, and none needed to test what is built on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import numpy as np

HELD = "held by an output of the model"  # why a value is pinned that someone else holds to the end of the step
RETURNED = "returned by the model"  # of one that nobody holds after forward but for its loss

RESIDENT = ("parameters", "buffers", "inputs", "gradients", "optimizer", "libraries", "others")
KINDS = (*RESIDENT, "activations", "recomputed", "outputs", "working set")
"""What memory is for. Gradients are those of parameters and inputs; activations are kept on the device for backward; the
working set is all else: what an op makes for the next ones, gradients of activations, scratch memory of kernels."""


class Decision(str, Enum):
    """What happens to an activation between forward and backward (the words of `CheckpointPolicy`)."""

    SAVE = "save"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"


class Op(NamedTuple):
    """One kernel. `inputs`, in the order in which they are computed again, and `outputs` index `Program.values`.

    Recomputing it takes `again_us`, and holds `state_bytes` (random state) from its first run to the second. `pin`
    is the decision for its results where a person has made it. `origin` is the forward op whose gradient a backward op is for,
    -1 where unknown.
    """

    name: str
    cost_us: float
    workspace_bytes: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    launch_us: float = 0.0
    state_bytes: int = 0
    pin: Decision | None = None
    origin: int = -1

    @property
    def again_us(self) -> float:
        return self.cost_us + self.launch_us


class Value(NamedTuple):
    """A storage written in forward.

    `op` produces it, `last_forward` is the last forward position that reads it. `reads` are the backward positions at
    which it is asked for; it is held until `release` (a position, -1 when backward never reads it). `pinned` says why it
    can only be saved, "" when it may be recomputed. `passing_bytes` is what it occupies where it is not kept for backward;
    None means `bytes`. A compiler that fuses its producer into its readers never stores it there: 0,
    and they read its inputs instead. `over` are values of as many bytes: it is written over the first of them that its op is
    the last to read.
    """

    name: str
    bytes: int
    op: int
    last_forward: int
    reads: tuple[int, ...] = ()
    release: int = -1
    pinned: str = ""
    passing_bytes: int | None = None
    over: tuple[int, ...] = ()

    @property
    def passing(self) -> int:
        return self.bytes if self.passing_bytes is None else self.passing_bytes

    @property
    def is_output(self) -> bool:
        return self.pinned in (HELD, RETURNED)


class ValueTable(NamedTuple):
    """The numbers of a program's values, an array of each."""

    op: np.ndarray
    bytes: np.ndarray
    passing: np.ndarray
    last_forward: np.ndarray
    release: np.ndarray


class Fixed(NamedTuple):
    """A storage that lives from position `born` to position `dies`, both included. `kind` is one of `KINDS`. `over` are values
    of forward, as a value has them."""

    born: int
    dies: int
    bytes: int
    kind: str = "working set"
    over: tuple[int, ...] = ()


class Move(NamedTuple):
    """When the results of an op, copied to the host as they are made, leave the device and come back.

    `release` is the forward position after which the device memory is let go: compute waits there for the copy. `reload` is the
    backward position before which the copy back starts, -1 where it starts when its first reader asks.
    """

    release: int
    reload: int = -1


class Link(NamedTuple):
    """The way between device and host: bytes per microsecond out and in, microseconds to start a copy; `overlaps` says whether
    compute goes on meanwhile."""

    out_bytes_per_us: float
    in_bytes_per_us: float
    overlaps: bool
    start_us: float = 0.0

    def out_us(self, size: int) -> float:
        """Time to copy `size` bytes to the host."""
        return self.start_us + size / self.out_bytes_per_us

    def in_us(self, size: int) -> float:
        """Time to copy `size` bytes back."""
        return self.start_us + size / self.in_bytes_per_us


@dataclass(frozen=True)
class Program:
    """One step. Position p < len(forward) is forward op p; the backward ops follow.

    `moments` are the backward positions before which a copy back can be started, with the names of what tells that they have
    come. Where `regions_hold`, the inputs of a stretch that runs as one stay to its end. Where `saved_stay`, what forward saves
    is held until backward has last read it, and cannot be let go of in between. `resident` says what `resident_bytes`
    are for, by kind. `modules` are the paths of the modules that the forward ops come from. `parts` are the stretches [start,
    stop) of forward that can be rewritten, none across their ends; none are given where that is all of it. Without a `link`
    nothing moves to the host. The first `loss_ops` of backward are those of a loss outside of the model. `holds_outputs`
    is whether outputs of the model count until the step ends.
    """

    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    values: tuple[Value, ...]
    fixed: tuple[Fixed, ...]
    resident_bytes: int
    moments: tuple[tuple[int, str], ...] = ()
    link: Link | None = None
    regions_hold: bool = True
    saved_stay: bool = False
    resident: tuple[tuple[str, int], ...] = ()
    modules: tuple[str, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()
    loss_ops: int = 0
    holds_outputs: bool = True

    @cached_property
    def fixed_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`fixed` as arrays: born, dies, bytes."""
        table = np.array([fixed[:3] for fixed in self.fixed], dtype=np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    @cached_property
    def fixed_kinds(self) -> np.ndarray:
        """The kinds of `fixed`, as indices of `KINDS`."""
        return np.array([KINDS.index(fixed.kind) for fixed in self.fixed], dtype=np.int64)

    @cached_property
    def value_table(self) -> ValueTable:
        columns = zip(*((v.op, v.bytes, v.passing, v.last_forward, v.release) for v in self.values), strict=True)
        arrays = [np.array(column, dtype=np.int64) for column in columns]
        return ValueTable(*(arrays or [np.zeros(0, dtype=np.int64)] * len(ValueTable._fields)))

    @cached_property
    def is_output(self) -> np.ndarray:
        """By value, whether it is an output of the model."""
        return np.array([value.is_output for value in self.values], dtype=bool)

    @cached_property
    def fused(self) -> tuple[Op, ...]:
        """The forward ops with a result that is not stored where it is not kept, the last first."""
        return tuple(op for op in reversed(self.forward) if any(not self.values[v].passing for v in op.outputs))

    @cached_property
    def writing(self) -> tuple[int, ...]:
        """The values that are written over others."""
        return tuple(v for v, value in enumerate(self.values) if value.over)

    @cached_property
    def scratch_bytes(self) -> np.ndarray:
        """`workspace_bytes` of each op, by position."""
        return np.array([op.workspace_bytes for op in (*self.forward, *self.backward)], dtype=np.int64)

    @cached_property
    def unpacked(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The backward positions at which values are read, in order, each with those values."""
        found: dict[int, list[int]] = {}
        for v, value in enumerate(self.values):
            for position in value.reads:
                found.setdefault(position, []).append(v)
        return tuple((position, tuple(values)) for position, values in sorted(found.items()))

    @cached_property
    def running_order(self) -> list[tuple[int, bool]]:
        """Every op in turn, nothing recomputed."""
        return [(position, False) for position in range(len(self.forward) + len(self.backward))]

    def pinned(self, decision: Decision) -> frozenset[int]:
        """The forward ops for whose results a person has made this decision."""
        return frozenset(p for p, op in enumerate(self.forward) if op.pin is decision)

    @property
    def step_us(self) -> float:
        """Time of the step when nothing is recomputed."""
        return sum(op.cost_us for op in self.forward) + sum(op.cost_us for op in self.backward)

    def may_recompute(self, position: int) -> bool:
        """Whether all that a forward op makes may be computed again. What a person has decided is another matter."""
        outputs = self.forward[position].outputs
        return bool(outputs) and not any(self.values[v].pinned for v in outputs)

    def may_move(self, position: int) -> bool:
        """Whether moving what a forward op makes to the host frees device memory, and can be done: not in parts of a model."""
        return not self.parts and not any(self.values[v].is_output for v in self.forward[position].outputs)

    def in_one_part(self, start: int, stop: int) -> bool:
        """False where the stretch [start, stop) of forward goes across an end of one of `parts`."""
        return not any(start < edge < stop for part in self.parts for edge in part)

    def op_at(self, position: int) -> Op:
        n = len(self.forward)
        return self.forward[position] if position < n else self.backward[position - n]

    def name_of(self, v: int) -> str:
        """What value `v` is called: its op, with a number where that has several results."""
        op = self.forward[self.values[v].op]
        return op.name if len(op.outputs) == 1 else f"{op.name}.{op.outputs.index(v)}"

    def module_at(self, position: int) -> str:
        """The module of an op, or of the one whose gradient it is for; "" where unknown."""
        origin = position if position < len(self.forward) else self.op_at(position).origin
        return self.modules[origin] if 0 <= origin < len(self.modules) else ""


def held_until(program: Program, regions: Sequence[tuple[int, int]], ops: np.ndarray, readers: np.ndarray) -> np.ndarray:
    """The forward positions to which results of `ops` stay, when `readers` are the last to read them: inputs of a region stay
    to its end. A reader after forward says that one is never let go of there."""
    if not program.regions_hold or not regions:
        return readers
    starts, stops = np.array(regions).T
    index = np.searchsorted(starts, readers, side="right") - 1  # -1 before the first, and then no reader is before its stop
    start, stop = np.where(index >= 0, starts[index], len(program.forward)), np.where(index >= 0, stops[index], 0)
    inside = (readers < len(program.forward)) & (ops < start) & (start <= readers) & (readers < stop)
    return np.where(inside, stop - 1, readers)
