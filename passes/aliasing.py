"""Which nodes share a storage. Views are free and own nothing: size and lifetime belong to the storage."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_UNMARKED_VIEWS = {  # views whose schemas do not say so
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsafe_chunk.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
}
_COPY_STORAGES = {  # ops that keep their first argument's strides, by a copy of all that it is a view of
    torch.ops.aten.copy.default,
    torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select_scatter.default,
    torch.ops.aten.diagonal_scatter.default,
    torch.ops.aten.as_strided_scatter.default,
}
_MADE_LIKE_INPUTS = {  # ops whose result lies in storage made for the elements of so many first inputs, and then resized
    torch.ops.aten.mse_loss.default: 2,
    torch.ops.aten.smooth_l1_loss.default: 2,
    torch.ops.aten.soft_margin_loss.default: 2,
    torch.ops.aten.binary_cross_entropy.default: 2,
    torch.ops.aten.col2im.default: 1,
}


def results(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph with a flat output returns: nodes, and None or constants between them."""
    flat = graph.output_node().args[0]
    return tuple(flat) if isinstance(flat, tuple | list) else (flat,)


def is_view(node: fx.Node) -> bool:
    """True if the node's result is a view of its first argument: views, and items of what `split` and its like return.

    A view of a constant (`aten._conj(1j)`) is none: the op makes the tensor that it views.
    """
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    if node.target in _UNMARKED_VIEWS:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def storage_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the node that allocated its storage: itself, if it is neither a view nor an item of an op's outputs."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = _viewed(node)
        roots[node] = roots.get(source, source) if source is not None else node
    return roots


def _viewed(node: fx.Node) -> fx.Node | None:
    if is_view(node) or (node.op == "call_function" and node.target is operator.getitem):
        return node.all_input_nodes[0]
    return None


def owner(node: fx.Node) -> fx.Node:
    """The node whose storage this is: an op, or the item of an op with several outputs."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def made_bytes(node: fx.Node) -> int:
    """Bytes of the storage that torch's own kernel makes for a node's one result; a compiler's has `storage_bytes`."""
    size = storage_bytes(node.meta.get("val"))
    while node.target in _COPY_STORAGES and isinstance(node.args[0], fx.Node):
        node = owner(node.args[0])
        size = max(size, storage_bytes(node.meta.get("val")))
    numel = made_numel(node.target, [source.meta.get("val") for source in node.all_input_nodes])
    return max(size, numel * node.meta["val"].element_size() if numel else 0)


def picked_bytes(node: fx.Node) -> int:
    """Bytes of the sparse gradient of sums of rows, which its fake kernel takes to be empty: a row for each index, which is
    there. 0 for all other nodes."""
    value, indices = node.meta["val"], node.args[1] if len(node.args) > 1 else None
    if node.target is not torch.ops.aten._embedding_bag_backward.default or value.layout is torch.strided:
        return 0
    assert isinstance(indices, fx.Node)
    return int(indices.meta["val"].numel()) * value.shape[1] * value.element_size()


def made_numel(op: Any, inputs: Sequence[Any]) -> int:
    """Elements that the storage of an op's result has at least; 0 where it has what the result shows."""
    n = _MADE_LIKE_INPUTS.get(op, 0)
    return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in inputs[:n]))) if n else 0


def storage_bytes(value: Any) -> int:
    """Bytes of the storage behind one tensor as planned: its extent, since a fresh result has no slack."""
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return 0
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return int(extent) * value.element_size()
