"""A plan's peak and step time as functions of the inputs' sizes.

With its decisions kept, a plan's step runs the same ops in the same order whatever the sizes, and the bytes live at each moment
are a polynomial in them (each storage's size is a product of sizes). So the step is recorded at a few sizes, and each moment
interpolated: exact for polynomials of at most second degree in each dimension, which one more recording checks. The peak is the
largest of the moments. Scratch memory of kernels may follow no polynomial (a product in half precision on a CPU takes steps);
such counts as the most of it that was recorded.
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
from remat.replay import Replay
from remat.sizes import SizedCall
from remat.whole import TracedModel

DEGREE = 2
TOLERANCE = 0.002  # between formula and recording: allocators round sizes up


def with_formulas(plan: Plan, call: SizedCall) -> Plan:
    """The plan, made for that call, with formulas in the dimensions that may change size. Raises RematError where other sizes
    make another graph, or a peak that is no polynomial of second degree."""
    dims = tuple(call.axes)
    planned = tuple(map(call.size_of, dims))
    base = _traced(call, plan, planned)
    replays, times = {}, {}
    for point in itertools.product(*map(grid, planned)):
        traced = base if point == planned else _traced(call, plan, point)
        if _ops(traced.program) != _ops(base.program):
            sizes = ", ".join(f"{dim}={size}" for dim, size in zip(dims, point, strict=True))
            raise RematError(f"at {sizes} the model runs other ops, so that no formula covers both; plan for each size")
        replay = traced.decided(plan).replay
        replays[point] = replay
        times[point] = (traced.program.step_us + replay.added_us,)
    check = tuple(max(grid(size)) + min(grid(size)) for size in planned)
    there = _traced(call, plan, check).decided(plan).replay
    live = _with_even_scratch(replays | {check: there}, check)
    found = max(live.pop(check))
    peak, step = interpolated(live, dims), interpolated(times, dims)
    if abs(peak(dict(zip(dims, check, strict=True))) - found) > TOLERANCE * found:
        raise RematError(f"the peak is no polynomial of second degree in {', '.join(dims)}; plan for each size")
    return dataclasses.replace(plan, peak_formula=peak, step_us_formula=step)


def _traced(call: SizedCall, plan: Plan, sizes: tuple[int, ...]) -> TracedModel:
    """The step that the plan is for, at other sizes of the call's axes."""
    return call.traced(dict(zip(call.axes, sizes, strict=True))).of(plan)


def _ops(program: Program) -> Any:
    """Equal where step and replay have the same ops, whatever their sizes."""
    ops = [op.name for op in (*program.forward, *program.backward)]
    return ops, [(value.name, value.op, value.reads) for value in program.values]


def _with_even_scratch(replays: Mapping[tuple[int, ...], Replay], check: tuple[int, ...]) -> dict[tuple[int, ...], np.ndarray]:
    """Live bytes of each replay. Scratch memory that at `check` is not what interpolation between the others says counts as the
    most of it in any of those."""
    scratch = {point: replay.program.scratch_bytes[[at for at, _ in replay.schedule]] for point, replay in replays.items()}
    others, powers = [point for point in replays if point != check], _powers(len(check))
    between = np.array([scratch[point] for point in others])
    weights = (np.array(_products(check, powers), dtype=object) @ _inverse(others, powers)).astype(float)
    uneven = np.abs(weights @ between - scratch[check]) > TOLERANCE * replays[check].peak_bytes
    more = {point: np.where(uneven, between.max(axis=0) - row, 0) for point, row in scratch.items()}
    return {point: np.array(replay.live_bytes) + more[point] for point, replay in replays.items()}


def grid(size: int) -> tuple[int, ...]:
    """Sizes near `size` to record at, not above it where that can be, and never 1, where graphs differ."""
    if size % 4 == 0 and size >= 8:
        return size // 4, size // 2, size
    start = max(size, 2)
    return start, 2 * start, 3 * start


def interpolated(samples: Mapping[tuple[int, ...], Sequence[float] | np.ndarray], dims: tuple[str, ...]) -> Formula:
    """The formula that takes the largest of the given numbers at each sample: a grid of DEGREE + 1 sizes in each dimension."""
    powers = _powers(len(dims))
    distinct = np.unique(np.array(list(samples.values())), axis=1)
    exact = np.array([[Fraction(x) for x in row] for row in distinct.tolist()], dtype=object)
    rows = _undominated((_inverse(list(samples), powers) @ exact).T)
    return Formula(dims, powers, tuple(tuple(map(str, row)) for row in rows))


def _powers(dims: int) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.product(range(DEGREE + 1), repeat=dims))


def _products(point: tuple[int, ...], powers: Sequence[tuple[int, ...]]) -> list[int]:
    return [math.prod(s**p for s, p in zip(point, power, strict=True)) for power in powers]


def _inverse(points: Sequence[tuple[int, ...]], powers: Sequence[tuple[int, ...]]) -> np.ndarray:
    """What numbers at the points are multiplied with for the coefficients of the polynomial through them: exact fractions."""
    matrix = sympy.Matrix([_products(point, powers) for point in points])
    return np.array([[Fraction(int(x.p), int(x.q)) for x in row] for row in matrix.inv().tolist()], dtype=object)


def _undominated(rows: np.ndarray) -> list[np.ndarray]:
    """Without polynomials none of whose coefficients is above the other's: those are never the largest."""
    floats = rows.astype(float)
    order = np.argsort(-floats.sum(axis=1), kind="stable")
    kept: list[int] = []
    for i in order:
        if not any((floats[k] >= floats[i]).all() for k in kept):
            kept.append(int(i))
    return [rows[i] for i in kept]
