"""Rewrite a forward graph: what a CPU's kernels lay out otherwise than torch's fake ones is copied into the layout traced.

A kernel may write its result row by row whatever the layout of what it reads, where its fake one keeps that (torch's
`aot_eager` fails there). A model run as it is copies such a result where it reshapes it; a captured graph has a view there.
"""

from __future__ import annotations

import operator
from functools import partial

import torch
from torch import fx

aten = torch.ops.aten

_BATCH_NORMS = {  # which keep the layout of images with their channels last
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def lay_out_as_traced(graph: fx.Graph) -> None:
    """Have what reads such a result read a copy with the strides that it was traced with."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        source, value = node.args[0], node.meta["val"]
        if node.args[1] == 0 and value.device.type == "cpu" and _is_written_by_rows(source.target, value):
            _copy_after(node)


def _is_written_by_rows(target: object, traced: torch.Tensor) -> bool:
    """Whether a result, traced like this, comes row by row, and was not traced so."""
    if traced.is_contiguous():
        return False
    if target in _BATCH_NORMS:
        return not traced.is_contiguous(memory_format=_FORMATS.get(traced.dim(), torch.contiguous_format))
    return target is aten.log_sigmoid_forward.default


def _copy_after(node: fx.Node) -> None:
    value = node.meta["val"]
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    back = [order.index(dim) for dim in range(value.dim())]
    readers = list(node.users)
    node.meta = {**node.meta, "val": value.contiguous()}
    after = node
    there, again = (partial(aten.permute.default, dims=dims) for dims in (order, back))
    for call in (there, partial(aten.clone.default, memory_format=torch.contiguous_format), again):
        with node.graph.inserting_after(after):
            made = node.graph.call_function(call.func, (after,), call.keywords)
        made.meta = {**node.meta, "val": call(after.meta["val"])}
        after = made
    for reader in readers:
        reader.replace_input_with(node, after)
