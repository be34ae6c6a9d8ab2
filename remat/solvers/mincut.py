"""What to save at a price on bytes: an exact minimum cut, and the convex hull of (saved bytes, recompute time).

Project selection (Picard 1976): saving a value costs price x bytes, recomputing it costs time and needs its inputs, saved
or recomputed. Each item is split into in(v) and out(v); arcs source → in(v) with the recompute time (infinite where
recompute is banned), in(v) → out(v) with the price of saving, out(u) → in(v) infinite for each input u, out(v) → sink
infinite where backward needs v. The items on the sink side of in(v) are recomputed. Cuts are nested in the price
(Gallo, Grigoriadis, Tarjan 1989), so that bisection on the slope finds every corner of the hull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_SCALE, _INFINITE = 2**29, 2**30  # scipy's flow is int32


@dataclass(frozen=True)
class Items:
    """What there is to choose on. Item v reads the items `inputs[v]`; what lies outside is always available and not listed."""

    bytes: Sequence[int]
    cost_us: Sequence[float]
    inputs: Sequence[Sequence[int]]
    needed: Sequence[bool]
    banned: Sequence[bool]


def closure(items: Items, recomputed: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """The items really recomputed when those in `recomputed` are not saved, and those that must be saved for it."""
    again: set[int] = set()
    saved: set[int] = set()
    stack = [v for v, needed in enumerate(items.needed) if needed]
    while stack:
        v = stack.pop()
        if v in again or v in saved:
            continue
        if v not in recomputed:
            saved.add(v)
            continue
        again.add(v)
        stack.extend(items.inputs[v])
    return frozenset(again), frozenset(saved)


def totals(items: Items, recomputed: frozenset[int]) -> tuple[int, float]:
    """(saved bytes, recompute time) of a choice."""
    again, saved = closure(items, recomputed)
    return sum(items.bytes[v] for v in saved), sum(items.cost_us[v] for v in again)


def cheapest(items: Items, price: float) -> frozenset[int]:
    """The items to recompute so that price x saved bytes + recompute time is minimal."""
    n = len(items.bytes)
    source, sink = 2 * n, 2 * n + 1
    rows: list[int] = []
    columns: list[int] = []
    capacities: list[float] = []

    def arc(tail: int, head: int, capacity: float) -> None:
        rows.append(tail)
        columns.append(head)
        capacities.append(min(capacity, _INFINITE))

    scale = _SCALE / (max(sum(items.cost_us), price * sum(items.bytes)) + 1e-9)
    for v in range(n):
        arc(source, v, _INFINITE if items.banned[v] else round(items.cost_us[v] * scale))
        arc(v, n + v, round(price * items.bytes[v] * scale))
        for u in set(items.inputs[v]):
            arc(n + u, v, _INFINITE)
        if items.needed[v]:
            arc(n + v, sink, _INFINITE)
    shape = (2 * n + 2, 2 * n + 2)
    network = csr_matrix((np.array(capacities, dtype=np.int32), (rows, columns)), shape=shape)
    residual = network - maximum_flow(network, source, sink).flow
    residual.data = np.where(residual.data > 0, 1, 0).astype(np.int32)
    residual.eliminate_zeros()
    reached = set(breadth_first_order(residual, source, return_predecessors=False).tolist())
    return frozenset(v for v in range(n) if v not in reached and not items.banned[v])


def hull(items: Items, most: int = 24) -> list[frozenset[int]]:
    """Recompute sets at the corners of the convex hull of (saved bytes, recompute time), from save-all to save-least."""
    nothing: frozenset[int] = frozenset()
    least = max(1.0, sum(items.bytes) * 1e-5)  # differences below this are rounding
    everything = cheapest(items, 2 * sum(items.cost_us) / least)  # dear enough that bytes alone decide
    corners = {nothing, everything}
    stack = [(nothing, everything)]
    while stack and len(corners) < most:
        left, right = stack.pop(0)
        (left_bytes, left_us), (right_bytes, right_us) = totals(items, left), totals(items, right)
        if left_bytes <= right_bytes:
            continue
        price = (right_us - left_us) / (left_bytes - right_bytes)
        middle = cheapest(items, price)
        middle_bytes, middle_us = totals(items, middle)
        if middle_us + price * middle_bytes < (left_us + price * left_bytes) * (1 - 1e-6) - 1e-9:
            corners.add(middle)
            stack += [(left, middle), (middle, right)]
    return sorted(corners, key=lambda r: (-totals(items, r)[0], totals(items, r)[1]))
