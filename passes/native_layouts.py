"""Rewrite a forward graph: views of what kernels lay out otherwise than torch's fake ones are views of a copy.

A kernel may write its result row by row whatever the layout of what it reads, where its fake one keeps that. A model run as it
is reshapes such a result by a copy; the graph that was traced has a view there, which fails (in torch's `aot_eager` too).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from remat._torch import OpOverload, pytree

aten = torch.ops.aten

_BATCH_NORMS = {  # which keep the layout of images with their channels last
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def copy_for_views(graph: fx.Graph) -> None:
    """Follow the layouts that results really have through the graph, and copy before each view that they do not admit."""
    real: dict[fx.Node, Any] = {}  # results that lie otherwise than they were traced
    for node in graph.nodes:
        value = _followed(node, real)
        if node.target is operator.getitem and node.args[1] == 0 and _comes_by_rows(node.args[0].target, value):
            value = value.contiguous()
        if value is not node.meta.get("val") and _strides(value) != _strides(node.meta["val"]):
            real[node] = value
            node.meta = {**node.meta, "val": value}


def _followed(node: fx.Node, real: dict[fx.Node, Any]) -> Any:
    """A node's result on the tensors that it really reads."""
    traced = node.meta.get("val")
    changed = [source for source in node.all_input_nodes if source in real]
    if not changed or any("val" not in source.meta for source in node.all_input_nodes):
        return traced
    if node.target is operator.getitem:
        return real[changed[0]][node.args[1]]
    if not isinstance(node.target, OpOverload):
        return traced
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta["val"])
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, ValueError):
        if node.target is not aten.view.default:
            raise
        _copy_before(node, changed[0])
        return traced


def _comes_by_rows(target: object, value: torch.Tensor) -> bool:
    """Whether an op's result comes row by row, and its fake one does not."""
    if target in _BATCH_NORMS:
        formats = (torch.contiguous_format, _FORMATS.get(value.dim(), torch.contiguous_format))
        return not any(value.is_contiguous(memory_format=each) for each in formats)
    return target is aten.log_sigmoid_forward.default and not value.is_contiguous()


def _strides(value: Any) -> list[tuple[int, ...]]:
    """Of all tensors in a result, along dimensions in which there is more than one element."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [tuple(step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1) for t in tensors]


def _copy_before(view: fx.Node, source: fx.Node) -> None:
    with view.graph.inserting_before(view):
        copy = view.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copy.meta = {**source.meta, "val": source.meta["val"].contiguous()}
    view.replace_input_with(source, copy)
