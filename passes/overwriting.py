"""Storages that a compiler's kernels take over from what they read."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from remat._torch import statically_known_true
from remat.passes.aliasing import is_view, storage_bytes
from remat.passes.fusion import is_costly, is_reduction, op_name

_ELEMENTWISE = frozenset(["where", "_to_copy", "clone", "convert_element_type"])  # without the tag for it


def overwritten(
    nodes: Sequence[fx.Node],
    inlined: Collection[fx.Node],
    readers: Mapping[fx.Node, Sequence[fx.Node]],
    kept: Collection[fx.Node],
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """By node of `nodes` what its result is written over, if nothing reads that later (Inductor's
    `SchedulerNode.decide_inplace_update`).

    That is what has as many bytes and is read element by element, and which nothing in `nodes` reads beside it; on a CPU, no
    reduction in the same outer loop either. Where some of them are `inlined`, and not stored, the next one counts.

    readers: the nodes that read a storage, views and what is `inlined` aside. kept: storages that stay as they are.
    """
    order = {node: p for p, node in enumerate(nodes)}
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in nodes:
        if not _is_elementwise(node):
            continue
        straight, askew = _reads(node, inlined)
        sources = [
            source
            for source in straight
            if source.op == "call_function"
            and source not in kept
            and _is_like(source, node)
            and not _shares_loop(node, source, askew.intersection(readers[source]), askew, inlined)
            and _is_computed_from(node, [r for r in readers[source] if order.get(r, len(order)) < order[node]], order)
        ]
        if sources:
            found[node] = tuple(sources)
    return found


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or op_name(node) in _ELEMENTWISE


def _is_like(source: fx.Node, node: fx.Node) -> bool:
    one, other = source.meta.get("val"), node.meta["val"]
    return isinstance(one, torch.Tensor) and one.dtype is other.dtype and storage_bytes(one) == storage_bytes(other)


def _shares_loop(
    node: fx.Node, source: fx.Node, others: Collection[fx.Node], askew: Collection[fx.Node], inlined: Collection[fx.Node]
) -> bool:
    """Whether a C++ kernel goes over a source twice in one outer loop, for a reduction among the `others` that read it and for
    the node: it writes over nothing (`CppScheduling.codegen_outer_loop_node`). Where the reduction's logarithm is stored, as in
    a log-softmax, that has a loop of another step, and there are three."""
    if node.meta["val"].device.type != "cpu" or any(is_costly(other) for other in askew):
        return False
    reductions = [other for other in others if is_reduction(other)]
    return bool(reductions) and any(_breaks(r, source, inlined) == _breaks(node, source, inlined) for r in reductions)


def _breaks(node: fx.Node, stored: fx.Node, inlined: Collection[fx.Node]) -> set[int]:
    """The dimensions after which a kernel's outer loop over rows has to end, since something that it reads, such as a mask, is
    the same all along that one or the next, and not along the other."""
    over = node.args[0] if is_reduction(node) else node
    assert isinstance(over, fx.Node)
    shape = over.meta["val"].shape
    rows = [dim for dim, size in enumerate(shape) if not statically_known_true(size == 1)][:-1]
    found: set[int] = set()
    stack, seen = [node], {node}
    while stack:
        reader = stack.pop()
        for source in reader.all_input_nodes:
            value = source.meta.get("val")
            if source in seen or not isinstance(value, torch.Tensor):
                continue
            seen.add(source)
            if is_view(source) or (source in inlined and source is not stored):
                stack.append(source)
            if not is_view(reader) and value.dim() <= len(shape):
                same = [True] * (len(shape) - value.dim())
                same += [
                    statically_known_true(size == 1) or stride == 0
                    for size, stride in zip(value.shape, value.stride(), strict=True)
                ]
                found.update(dim for dim, after in itertools.pairwise(rows) if same[dim] != same[after])
    return found


def _reads(node: fx.Node, inlined: Collection[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
    """Sources of which each element of the result reads the one at its own place, and no others; and the other ones. With those
    that are `inlined`, and what these read."""
    straight: dict[fx.Node, None] = {}
    askew: set[fx.Node] = set()
    elements = node.meta["val"].numel()
    stack = [(node, node.meta["val"].is_contiguous())]
    seen = set(stack)
    while stack:
        reader, is_straight = stack.pop()
        for source in reader.all_input_nodes:
            value = source.meta.get("val")
            fits = (
                isinstance(value, torch.Tensor) and value.is_contiguous() and statically_known_true(value.numel() == elements)
            )
            at = source, is_straight and fits and (is_view(reader) or _is_elementwise(reader))
            if at in seen:
                continue
            seen.add(at)
            if not is_view(source):
                straight.setdefault(source) if at[1] else askew.add(source)
            if is_view(source) or source in inlined:
                stack.append(at)
    return [source for source in straight if source not in askew], askew


def _is_computed_from(node: fx.Node, others: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> bool:
    missing = set(others)
    first = min(map(order.__getitem__, missing), default=0)
    seen: set[fx.Node] = set()
    stack = [node]
    while stack and missing:
        new = [s for s in stack.pop().all_input_nodes if s not in seen and order.get(s, -1) >= first]
        seen.update(new)
        missing.difference_update(new)
        stack += new
    return not missing
