"""What remat decided, as data: frozen, comparable, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import sympy

from remat.errors import RematError
from remat.program import Decision
from remat.simulate import Moment

FORMAT = 2


@dataclass(frozen=True)
class Activation:
    """A forward value that backward reads, and what becomes of it.

    bytes: of its storage. cost_us: time to compute it once. reason: why this decision. module: path of the module that made
    it. source: file and line of the user's code.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    cost_us: float
    decision: Decision
    reason: str
    module: str
    source: str


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
            if sizes[dim] < 1:
                raise RematError(f"{dim}={sizes[dim]} must be at least 1")
        products = [math.prod(sizes[d] ** p for d, p in zip(self.dims, power, strict=True)) for power in self.powers]
        return max(sum(Fraction(t) * p for t, p in zip(row, products, strict=True)) for row in self.terms)


@dataclass(frozen=True)
class Plan:
    """Decisions for one training step and what they are predicted to cost.

    Bytes are of the device and, for peaks, include `resident_bytes` (parameters, buffers, inputs, gradients and optimizer
    state found or given). `saved_bytes` is held on the device between forward and backward, `host_bytes` on the host. Times are
    of the cost model, in microseconds; `stall_us` is lost waiting for copies; `planning_seconds` counts from the end of
    tracing. `fingerprint` ties the plan to the graph it was made for, `structure` to its ops whatever their sizes. It has
    formulas if it was made with `dynamic_shapes`.
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
    dropped: tuple[str, ...] = field(repr=False)
    regions: tuple[tuple[str, str], ...] = field(repr=False)
    transfers: tuple[Transfer, ...] = field(repr=False)
    device: str
    door: str
    fingerprint: str
    structure: str = ""
    peak_formula: Formula | None = field(default=None, repr=False)
    step_us_formula: Formula | None = field(default=None, repr=False)

    def peak_bytes_at(self, **sizes: int) -> int:
        """The peak of this plan's step at other sizes, decisions as they are: `plan.peak_bytes_at(batch=8, seq=512)`.

        Best between the sizes recorded, from a quarter of the planned ones up to them: far above, scratch memory of kernels
        that grows in steps makes it too low (by 1.5% at 8 times, 22% at 32 times the length, on a Llama on a CPU).
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

    def summary(self) -> str:
        """The plan as a table, equal blocks merged."""
        from remat.report import summary

        return summary(self)

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"format": FORMAT, **fields}, default=dataclasses.asdict, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote. Raises RematError when it is not one."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != FORMAT:
                raise RematError(f"this plan has another format than {FORMAT}; plan again with this version of remat")
            data["blocks"] = tuple(_block(block) for block in data["blocks"])
            data["timeline"] = tuple(Moment(**moment) for moment in data["timeline"])
            data["dropped"] = tuple(data["dropped"])
            data["regions"] = tuple((start, stop) for start, stop in data["regions"])
            data["transfers"] = tuple(_transfer(transfer) for transfer in data["transfers"])
            for name in ("peak_formula", "step_us_formula"):
                data[name] = _formula(data[name]) if data[name] else None
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RematError(f"this is not a plan that Plan.to_json wrote: {error}") from error

    def __str__(self) -> str:
        return self.summary()


def _needed(formula: Formula | None) -> Formula:
    if formula is None:
        raise RematError("this plan is for one size; plan with dynamic_shapes={'input_ids': {0: 'batch', 1: 'seq'}} for others")
    return formula


def _formula(data: dict[str, Any]) -> Formula:
    powers, terms = (tuple(tuple(row) for row in data[name]) for name in ("powers", "terms"))
    return Formula(tuple(data["dims"]), powers, terms)


def _block(data: dict[str, Any]) -> Block:
    activations = tuple(_activation(a) for a in data.pop("activations"))
    return Block(**data, activations=activations)


def _transfer(data: dict[str, Any]) -> Transfer:
    return Transfer(**{**data, "outputs": tuple(data["outputs"])})


def _activation(data: dict[str, Any]) -> Activation:
    return Activation(**{**data, "shape": tuple(data["shape"]), "decision": Decision(data["decision"])})
