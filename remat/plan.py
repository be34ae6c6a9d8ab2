"""What remat decided, as data: frozen and comparable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import sympy
import torch

from remat.errors import RematError
from remat.program import KINDS, Decision, Link
from remat.replay import Moment


@dataclass(frozen=True)
class Activation:
    """A forward value that backward reads, and what becomes of it.

    bytes: of its storage. cost_us: time to compute it once. reads: the values that this takes. reason: why this decision.
    module: path of the module that made it. source: file and line of the user's code.
    idle: the moments of the timeline, [first, last), between forward's last use of it and the next one or its recompute.
    ways: the decisions that can be carried out for it.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    cost_us: float
    reads: tuple[str, ...]
    decision: Decision
    reason: str
    module: str
    source: str
    idle: tuple[int, int] = (0, 0)
    ways: tuple[Decision, ...] = (Decision.SAVE,)


@dataclass(frozen=True)
class Block:
    """A stretch of the forward graph between two narrow cuts. `region` names its checkpoint region, "" when it runs inline.

    shape: equal for blocks that are equal up to names.
    """

    name: str
    module: str
    region: str
    shape: str
    saved_bytes: int
    recompute_us: float
    activations: tuple[Activation, ...]


@dataclass(frozen=True)
class Transfer:
    """The way of an op's results to the host and back, by names of forward nodes.

    outputs: which results, counted without empty ones. release: the node after which their device memory is let go of. reload:
    the node the arrival of whose gradient starts the copy back, "" where the first reader does.
    """

    name: str
    outputs: tuple[int, ...]
    bytes: int
    release: str
    reload: str


class Input(NamedTuple):
    """A tensor that the model was called with when it was planned."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Storage(NamedTuple):
    """Memory on the device from one moment of the timeline to another, by their indices, both included.

    kind: one of `remat.program.KINDS`. module: that of the op that makes it, or whose gradient it is.
    """

    name: str
    kind: str
    bytes: int
    born: int
    dies: int
    module: str


class PlannedCopy(NamedTuple):
    """A value on its way to the host, or back; microseconds from the start of the step."""

    name: str
    bytes: int
    is_back: bool
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Formula:
    """The largest of several polynomials in the sizes of named dimensions.

    terms: a row for each polynomial; of each row one coefficient, a fraction as text, for each of `powers`, which are a power
    of each dimension.
    """

    dims: tuple[str, ...]
    powers: tuple[tuple[int, ...], ...]
    terms: tuple[tuple[str, ...], ...]

    @property
    def expression(self) -> sympy.Expr:
        """The formula as a sympy expression in positive integer symbols."""
        symbols = [sympy.Symbol(dim, integer=True, positive=True) for dim in self.dims]
        products = [sympy.prod(s**p for s, p in zip(symbols, power, strict=True)) for power in self.powers]
        rows = [sympy.Add(*map(sympy.Mul, map(sympy.Rational, row), products)) for row in self.terms]
        return sympy.Max(*rows, evaluate=False) if len(rows) > 1 else rows[0]

    def __call__(self, sizes: Mapping[str, int]) -> Fraction:
        """The value at given sizes, one for each dimension. Raises RematError when one is missing, unknown or not positive."""
        for dim in (*self.dims, *sizes):
            if dim not in sizes or dim not in self.dims:
                raise RematError(f"sizes are needed for {', '.join(self.dims)}; given were {', '.join(sizes) or 'none'}")
            if not isinstance(sizes[dim], Integral) or sizes[dim] < 1:
                raise RematError(f"{dim}={sizes[dim]!r} must be a whole number, at least 1")
        products = [math.prod(sizes[d] ** p for d, p in zip(self.dims, power, strict=True)) for power in self.powers]
        return max(sum(Fraction(t) * p for t, p in zip(row, products, strict=True)) for row in self.terms)


@dataclass(frozen=True)
class Plan:
    """Decisions for one training step and what they are predicted to cost.

    Bytes are of the device and, for peaks, include `resident_bytes` (parameters, buffers, inputs, gradients and optimizer
    state found or given). `saved_bytes` is held on the device between forward and backward, `host_bytes` on the host. Times are
    of the cost model, in microseconds; `stall_us` is lost waiting for copies; `planning_seconds` counts from the end of
    tracing. `fingerprint` ties the plan to the graph it was made for, `structure` to its ops whatever their sizes. It has
    formulas if it was made with `dynamic_shapes`. `repeats` says of ops whose results backward lets go of between two of their
    readers, to compute them once more, how often it does.

    By names of forward nodes: `dropped` are computed again, `regions` the first and last ones of stretches that are rewritten,
    `transfers` what waits on the host. `door` is "eager" or "compiled".

    `link` is the way to the host, None where none was considered. `holds_outputs` says whether what the model returns beside
    its loss counts until the step ends. `timeline` is the step op by op, `baseline_timeline` the same with everything saved;
    `storages` add up to the live bytes of `timeline` at each moment. Through Inductor both are of the generated code, with a
    moment for each allocation.
    """

    budget_bytes: int | None
    peak_bytes: int
    baseline_peak_bytes: int
    resident_bytes: int
    saved_bytes: int
    host_bytes: int
    recompute_us: float
    stall_us: float
    step_us: float
    baseline_step_us: float
    planning_seconds: float
    blocks: tuple[Block, ...] = field(repr=False)
    timeline: tuple[Moment, ...] = field(repr=False)
    baseline_timeline: tuple[Moment, ...] = field(repr=False)
    storages: tuple[Storage, ...] = field(repr=False)
    copies: tuple[PlannedCopy, ...] = field(repr=False)
    dropped: tuple[str, ...] = field(repr=False)
    repeats: tuple[tuple[str, int], ...] = field(repr=False)
    regions: tuple[tuple[str, str], ...] = field(repr=False)
    transfers: tuple[Transfer, ...] = field(repr=False)
    device: str
    door: str
    fingerprint: str
    structure: str = ""
    model: str = ""
    inputs: tuple[Input, ...] = ()
    link: Link | None = None
    holds_outputs: bool = True
    torch_version: str = torch.__version__
    peak_formula: Formula | None = field(default=None, repr=False)
    step_us_formula: Formula | None = field(default=None, repr=False)

    def peak_bytes_at(self, **sizes: int) -> int:
        """The peak of this plan's step at other sizes, decisions as they are: `plan.peak_bytes_at(batch=8, seq=512)`.

        Best between the sizes recorded: a quarter of the planned one up to that where it divides by 4 and is at least 8, else
        the planned one (at least 2) up to three times that. Far above, scratch memory of kernels that grows in steps makes it
        too low (by 1.5% at 8 times, 22% at 32 times the length, on a Llama on a CPU).
        Raises RematError unless the plan was made with `dynamic_shapes`, and for sizes that are missing or unknown.
        """
        return math.ceil(_needed(self.peak_formula)(sizes))

    def step_us_at(self, **sizes: int) -> float:
        """The predicted time of a step with inputs of other sizes, in microseconds; otherwise as `peak_bytes_at`."""
        return float(_needed(self.step_us_formula)(sizes))

    @cached_property
    def decisions(self) -> Mapping[str, Decision]:
        """The decision for each activation, by value name."""
        return {a.name: a.decision for block in self.blocks for a in block.activations}

    def at_peak(self) -> dict[str, int]:
        """What is allocated at the peak of the timeline, in bytes by kind, the largest first."""
        top = max(self.timeline, key=lambda moment: moment.live_bytes)
        found = sorted(zip(KINDS, top.by_kind, strict=True), key=lambda pair: -pair[1])
        return {kind: size for kind, size in found if size}

    def summary(self) -> str:
        """The plan as a table, equal blocks merged."""
        from remat.table import summary

        return summary(self)

    def to_json(self) -> str:
        """The whole plan as JSON text; docs/plan.schema.json is its schema."""
        from remat.plan_file import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote. Raises RematError when it is not one, and says where."""
        from remat.plan_file import from_json

        return from_json(text)

    def to_html(self, path: str | Path | None = None, frontier: Sequence[Plan] = ()) -> str:
        """The plan as one page of HTML that needs no network, written to `path` if given.

        frontier: plans to show this one among, as `remat.frontier` returns them. Raises RematError without the extra `report`.
        """
        from remat.views.page import to_html

        return _written(to_html(self, frontier), path)

    def to_trace(self, path: str | Path | None = None) -> str:
        """The planned step as a Chrome trace for ui.perfetto.dev: compute, copies, memory. Written to `path` if given."""
        from remat.views.trace import to_trace

        return _written(to_trace(self), path)

    def to_snapshot(self, path: str | Path | None = None) -> bytes:
        """The planned step as a snapshot for pytorch.org/memory_viz, a pickle. Written to `path` if given."""
        from remat.views.snapshot import to_snapshot

        found = to_snapshot(self)
        if path is not None:
            Path(path).write_bytes(found)
        return found

    def _repr_html_(self) -> str:
        """The headline and the timeline, for notebooks; the table as text without the extra `report`."""
        from remat.table import notebook

        return notebook(self)

    def __str__(self) -> str:
        return self.summary()


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _needed(formula: Formula | None) -> Formula:
    if formula is None:
        raise RematError("this plan is for one size; plan with dynamic_shapes={'input_ids': {0: 'batch', 1: 'seq'}} for others")
    return formula
