"""Which forward nodes must never run twice, and why.

Recomputing must give the same bits and change nothing. Routing decisions (top-k, sort, argmax) can flip on a tie, data-
dependent shapes can differ, a collective would hang its peers, and an op that writes to something outside itself would
write twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from remat._torch import HigherOrderOperator, OpOverload, free_unbacked_symbols, pytree
from remat.passes.aliasing import owner
from remat.passes.randomness import is_random

aten = torch.ops.aten

_ROUTING = {
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.kthvalue.default,
    aten.searchsorted.Tensor,
    aten.histc.default,
    aten.bincount.default,
}


def is_collective(op: Any) -> bool:
    """True for ops that other ranks have to run too, and as often."""
    return isinstance(op, OpOverload) and op.namespace in ("_c10d_functional", "c10d_functional", "_dtensor", "c10d")


def _has_unknown_size(value: Any) -> bool:
    """Whether a result's size depends on data. Of an op that is tagged so it need not: a gather by indices that are numbers."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return not tensors or any(map(free_unbacked_symbols, tensors))


def why_pinned(node: fx.Node, mutated: frozenset[fx.Node]) -> str:
    """Why the node may not be recomputed; "" if it may. `mutated` are the inputs that the step writes to."""
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return "higher-order op"
    if not isinstance(target, OpOverload):
        return ""
    if target in _ROUTING:
        return "routing: a tie could fall the other way"
    is_shaped_by_data = torch.Tag.dynamic_output_shape in target.tags and _has_unknown_size(node.meta.get("val"))
    if is_shaped_by_data or torch.Tag.data_dependent_output in target.tags:
        return "shape depends on data"
    if is_collective(target):
        return "collective"
    if target._schema.is_mutable:
        return "writes to an input"
    if target.namespace not in ("aten", "prims", "prim") and is_random(node):
        return "random op outside ATen"
    return "reads a buffer that the step updates" if mutated.intersection(map(owner, node.all_input_nodes)) else ""
