"""Memory traffic of values that a compiler computes inside their readers instead of storing them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import fx

from remat.passes.aliasing import is_view, owner, storage_bytes

_REACH = 10  # nodes from one reader to the next that are taken to be one kernel


def extra_bytes(forward: Sequence[fx.Node], backward: Sequence[fx.Node], inlined: Collection[fx.Node]) -> dict[fx.Node, int]:
    """For each inlined node of forward the bytes that kernels read and write more than if it was stored for backward; less than
    nothing where that spares traffic.

    Stored, a value is written once and read by each kernel but the one that makes it. Inlined, each reads in its place what it
    is computed from, unless it reads that anyway. What is better stored counts as stored for its own readers, so that a link of
    a chain, such as a residual stream, costs one more read wherever it stands.
    """
    order = {node: p for p, node in enumerate((*forward, *backward))}
    readers = _readers(order)
    loads: dict[fx.Node, frozenset[fx.Node]] = {}  # what a kernel that reads an inlined node reads
    found: dict[fx.Node, int] = {}
    for node in forward:
        if node not in inlined:
            continue
        below = frozenset[fx.Node]().union(*(loads.get(owner(s), {owner(s)}) for s in node.all_input_nodes))
        uses, own = readers.get(node, []), storage_bytes(node.meta["val"])
        found[node] = -own if any(p >= len(forward) for p in uses) else -2 * own  # else backward reads it inside another
        for kernel in _kernels(order[node], uses):
            more = (source for source in below if all(abs(p - kernel) > _REACH for p in readers[source]))
            found[node] += sum(_read_bytes(source, node) for source in more) - own
        if found[node] <= 0:
            loads[node] = below
    return found


def _readers(order: Mapping[fx.Node, int]) -> dict[fx.Node, list[int]]:
    """Where each storage is read, views aside."""
    found: dict[fx.Node, list[int]] = {}
    for node, position in order.items():
        for source in () if is_view(node) else {owner(source) for source in node.all_input_nodes}:
            found.setdefault(source, []).append(position)
    return found


def _kernels(made: int, uses: Sequence[int]) -> Iterator[int]:
    """The first reader in each kernel but the one that makes the value."""
    last = made
    for use in uses:
        if use - last > _REACH:
            yield use
        last = use


def _read_bytes(source: fx.Node, node: fx.Node) -> int:
    """What of a source is read for a node: no more than an element for each of its own."""
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return min(storage_bytes(value), int(node.meta["val"].numel()) * value.dtype.itemsize)
