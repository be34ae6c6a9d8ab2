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


class Network:
    """The network of some items, whose capacities alone depend on the price."""

    def __init__(self, items: Items) -> None:
        n = len(items.bytes)
        self._source, self._sink = 2 * n, 2 * n + 1
        self._costs = np.array(items.cost_us, dtype=float)
        self._bytes = np.array(items.bytes, dtype=float)
        self._banned = np.array(items.banned, dtype=bool)
        inputs = [(n + u, v) for v, sources in enumerate(items.inputs) for u in set(sources)]
        needed = [(n + v, self._sink) for v in range(n) if items.needed[v]]
        arcs = [*((self._source, v) for v in range(n)), *((v, n + v) for v in range(n)), *inputs, *needed]
        tails, heads = np.array(arcs, dtype=np.int32).reshape(-1, 2).T
        rows, columns = np.concatenate([tails, heads]), np.concatenate([heads, tails])  # and back, as the flow needs
        self._order = np.lexsort((columns, rows))
        self._heads = columns[self._order]
        self._starts = np.searchsorted(rows[self._order], np.arange(self._sink + 2)).astype(np.int32)
        self._rest = np.array([_INFINITE] * (len(inputs) + len(needed)) + [0] * len(arcs), dtype=float)

    def cheapest(self, price: float) -> frozenset[int]:
        """The items to recompute so that price x saved bytes + recompute time is minimal."""
        scale = _SCALE / (max(self._costs.sum(), price * self._bytes.sum()) + 1e-9)
        recompute = np.where(self._banned, _INFINITE, np.rint(self._costs * scale))
        capacities = np.concatenate([recompute, np.rint(price * self._bytes * scale), self._rest])
        network = self._graph(capacities[self._order].astype(np.int32))
        residual = self._graph(network.data - maximum_flow(network, self._source, self._sink).flow.data)
        residual.eliminate_zeros()
        reached = np.zeros(self._sink + 1, dtype=bool)
        reached[breadth_first_order(residual, self._source, return_predecessors=False)] = True
        return frozenset(np.flatnonzero(~reached[: len(self._banned)] & ~self._banned).tolist())

    def _graph(self, data: np.ndarray) -> csr_matrix:
        return csr_matrix((data, self._heads.copy(), self._starts.copy()), shape=(self._sink + 1, self._sink + 1))


def hull(items: Items, most: int = 24) -> list[frozenset[int]]:
    """Recompute sets at the corners of the convex hull of (saved bytes, recompute time), from save-all to save-least."""
    nothing: frozenset[int] = frozenset()
    least = max(1.0, sum(items.bytes) * 1e-5)  # differences below this are rounding
    network = Network(items)
    everything = network.cheapest(2 * sum(items.cost_us) / least)  # dear enough that bytes alone decide
    corners = {nothing, everything}
    stack = [(nothing, everything)]
    while stack and len(corners) < most:
        left, right = stack.pop(0)
        (left_bytes, left_us), (right_bytes, right_us) = totals(items, left), totals(items, right)
        if left_bytes <= right_bytes:
            continue
        price = (right_us - left_us) / (left_bytes - right_bytes)
        middle = network.cheapest(price)
        middle_bytes, middle_us = totals(items, middle)
        if middle_us + price * middle_bytes < (left_us + price * left_bytes) * (1 - 1e-6) - 1e-9:
            corners.add(middle)
            stack += [(left, middle), (middle, right)]
    return sorted(corners, key=lambda r: (-totals(items, r)[0], totals(items, r)[1]))
