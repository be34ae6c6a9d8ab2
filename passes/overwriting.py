"""Storages that a compiler's kernels take over from what they read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from remat.passes.aliasing import is_view, storage_bytes
from remat.passes.fusion import is_reduction, op_name

_ELEMENTWISE = frozenset(["where", "_to_copy", "clone", "convert_element_type"])  # without the tag for it


def overwritten(
    nodes: Sequence[fx.Node],
    inlined: Collection[fx.Node],
    readers: Mapping[fx.Node, Sequence[fx.Node]],
    kept: Collection[fx.Node],
) -> dict[fx.Node, fx.Node]:
    """By node the one whose storage its result takes, both of `nodes` (Inductor's `SchedulerNode.decide_inplace_update`).

    That is one of as many bytes that it reads element by element, and that nothing reads after it or beside it; on a CPU, no
    reduction in the same outer loop either.

    readers: the nodes that read a storage, views and what is `inlined` aside. kept: storages that stay as they are.
    """
    order = {node: p for p, node in enumerate(nodes)}
    found: dict[fx.Node, fx.Node] = {}
    taken = set(kept)
    for node in nodes:
        if node in inlined or not _is_elementwise(node):
            continue
        straight, askew = _reads(node, inlined)
        for source in straight:
            if (
                source not in order
                or source in taken
                or not _is_like(source, node)
                or _shares_loop(node, source, askew, readers)
            ):
                continue
            above = _ancestors(node, order, order[source])
            if all(reader is node or reader in above for reader in readers[source]):
                found[node] = source
                taken.add(source)
                break
    return found


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or op_name(node) in _ELEMENTWISE


def _is_like(source: fx.Node, node: fx.Node) -> bool:
    one, other = source.meta.get("val"), node.meta["val"]
    return isinstance(one, torch.Tensor) and one.dtype is other.dtype and storage_bytes(one) == storage_bytes(other)


def _shares_loop(
    node: fx.Node, source: fx.Node, askew: Collection[fx.Node], readers: Mapping[fx.Node, Sequence[fx.Node]]
) -> bool:
    """Whether a C++ kernel goes over a source twice in one outer loop, for a reduction that the node needs and for the node: it
    writes over nothing (`CppScheduling.codegen_outer_loop_node`)."""
    is_cpu = node.meta["val"].device.type == "cpu"
    return is_cpu and any(is_reduction(other) and other in readers[source] for other in askew)


def _reads(node: fx.Node, inlined: Collection[fx.Node]) -> tuple[list[fx.Node], set[fx.Node]]:
    """Stored sources of which each element of the result reads the one at its own place, and no others; and the other ones."""
    straight: dict[fx.Node, None] = {}
    askew: set[fx.Node] = set()
    elements = node.meta["val"].numel()
    stack = [(node, node.meta["val"].is_contiguous())]
    seen = set(stack)
    while stack:
        reader, is_straight = stack.pop()
        for source in reader.all_input_nodes:
            value = source.meta.get("val")
            fits = isinstance(value, torch.Tensor) and value.is_contiguous() and value.numel() == elements
            at = source, is_straight and fits and (is_view(reader) or _is_elementwise(reader))
            is_stored = source.op != "call_function" or not (is_view(source) or source in inlined)
            if is_stored:
                straight.setdefault(source) if at[1] else askew.add(source)
            elif at not in seen:
                seen.add(at)
                stack.append(at)
    return [source for source in straight if source not in askew], askew


def _ancestors(node: fx.Node, order: Mapping[fx.Node, int], after: int) -> set[fx.Node]:
    """What a node is computed from, of what runs `after` some place."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = [s for s in stack.pop().all_input_nodes if s not in found and order.get(s, -1) > after]
        found.update(new)
        stack += new
    return found
