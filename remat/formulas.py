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
import torch
from torch import nn

from remat.errors import RematError
from remat.plan import Formula, Plan
from remat.shapes import named_axes, resized, size_of
from remat.whole import TracedModel, trace

DEGREE = 2
TOLERANCE = 0.002  # between formula and recording: allocators round sizes up


def with_formulas(
    plan: Plan,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | None = None,
    costs: str = "analytic",
) -> Plan:
    """The plan with formulas in the dimensions that `dynamic_shapes` names. Raises RematError where other sizes make another
    graph, or a peak that is no polynomial of second degree."""
    axes = named_axes(model, args, kwargs, dynamic_shapes)
    dims = tuple(axes)
    planned = tuple(size_of(args, kwargs, axes, dim) for dim in dims)

    def at(point: tuple[int, ...]) -> TracedModel:
        inputs = resized(args, kwargs, axes, dict(zip(dims, point, strict=True)))
        return trace(model, *inputs, optimizer, device, costs).of(plan)

    base = at(planned)
    live, times = {}, {}
    for point in itertools.product(*map(grid, planned)):
        traced = at(point)
        if traced.structure != base.structure:
            sizes = ", ".join(f"{dim}={size}" for dim, size in zip(dims, point, strict=True))
            raise RematError(f"at {sizes} the model runs other ops, so that no formula covers both; plan for each size")
        replay = traced.decided(plan).replay
        live[point] = replay.live_bytes
        times[point] = (traced.program.step_us + replay.added_us,)
    peak, step = interpolated(live, dims), interpolated(times, dims)
    check = tuple(max(grid(size)) + min(grid(size)) for size in planned)
    expected, found = peak(dict(zip(dims, check, strict=True))), at(check).decided(plan).replay.peak_bytes
    if abs(expected - found) > TOLERANCE * found:
        raise RematError(f"the peak is no polynomial of second degree in {', '.join(dims)}; plan for each size")
    return dataclasses.replace(plan, peak_formula=peak, step_us_formula=step)


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
