"""A plan's peak and step time as functions of the inputs' sizes.

With its decisions kept, a plan's step runs the same ops in the same order whatever the sizes, and the bytes live at each moment
are a polynomial in them (each storage's size is a product of sizes). So the step is recorded at a few sizes, and each moment
interpolated: exact for polynomials of at most second degree in each dimension, which one more recording checks. The peak is the
largest of the moments.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import sympy

from remat.errors import RematError
from remat.plan import Formula, Plan
from remat.program import Program
from remat.sizes import SizedCall
from remat.whole import TracedModel

DEGREE = 2
TOLERANCE = 0.002  # between formula and recording: allocators round sizes up


def with_formulas(plan: Plan, call: SizedCall) -> Plan:
    """The plan, made for that call, with formulas in the dimensions that may change size. Raises RematError where other sizes
    make another graph, or a peak that is no polynomial of second degree."""
    dims = tuple(call.axes)
    planned = tuple(map(call.size_of, dims))
    base = _ops(_traced(call, plan, planned).program)
    live, times = {}, {}
    for point in itertools.product(*map(grid, planned)):
        traced = _traced(call, plan, point)
        if _ops(traced.program) != base:
            sizes = ", ".join(f"{dim}={size}" for dim, size in zip(dims, point, strict=True))
            raise RematError(f"at {sizes} the model runs other ops, so that no formula covers both; plan for each size")
        replay = traced.decided(plan).replay
        live[point] = replay.live_bytes
        times[point] = (traced.program.step_us + replay.added_us,)
    peak, step = interpolated(live, dims), interpolated(times, dims)
    check = tuple(max(grid(size)) + min(grid(size)) for size in planned)
    expected = peak(dict(zip(dims, check, strict=True)))
    found = _traced(call, plan, check).decided(plan).replay.peak_bytes
    if abs(expected - found) > TOLERANCE * found:
        raise RematError(f"the peak is no polynomial of second degree in {', '.join(dims)}; plan for each size")
    return dataclasses.replace(plan, peak_formula=peak, step_us_formula=step)


def _traced(call: SizedCall, plan: Plan, sizes: tuple[int, ...]) -> TracedModel:
    """The step that the plan is for, at other sizes of the call's axes."""
    return call.traced(dict(zip(call.axes, sizes, strict=True))).of(plan)


def _ops(program: Program) -> Any:
    """Equal where step and replay have the same ops, whatever their sizes."""
    ops = [op.name for op in (*program.forward, *program.backward)]
    return ops, [(value.name, value.op, value.reads) for value in program.values]


def grid(size: int) -> tuple[int, ...]:
    """Sizes near `size` to record at, not above it where that can be, and never 1, where graphs differ."""
    if size % 4 == 0 and size >= 8:
        return size // 4, size // 2, size
    start = max(size, 2)
    return start, 2 * start, 3 * start


def interpolated(samples: Mapping[tuple[int, ...], Sequence[float]], dims: tuple[str, ...]) -> Formula:
    """The formula that takes the largest of the given numbers at each sample: a grid of DEGREE + 1 sizes in each dimension."""
    powers = tuple(itertools.product(range(DEGREE + 1), repeat=len(dims)))
    sizes = list(samples)
    values = np.unique(np.array([samples[point] for point in sizes]), axis=1)
    matrix = sympy.Matrix([[math.prod(s**p for s, p in zip(point, power, strict=True)) for power in powers] for point in sizes])
    inverse = np.array([[Fraction(int(x.p), int(x.q)) for x in row] for row in matrix.inv().tolist()], dtype=object)
    exact = np.array([[Fraction(x) for x in row] for row in values.tolist()], dtype=object)
    rows = _undominated((inverse @ exact).T)
    return Formula(dims, powers, tuple(tuple(map(str, row)) for row in rows))


def _undominated(rows: np.ndarray) -> list[np.ndarray]:
    """Without polynomials none of whose coefficients is above the other's: those are never the largest."""
    floats = rows.astype(float)
    order = np.argsort(-floats.sum(axis=1), kind="stable")
    kept: list[int] = []
    for i in order:
        if not any((floats[k] >= floats[i]).all() for k in kept):
            kept.append(int(i))
    return [rows[i] for i in kept]
