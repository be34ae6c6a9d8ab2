"""Rewrite a forward graph: cross-entropy over rows becomes `remat::cross_entropy`, which keeps no softmax."""

from __future__ import annotations

import torch
from torch import fx

from remat.loss import cross_entropy
from remat.passes.aliasing import is_view
from remat.passes.randomness import eliminate_dead_code

aten = torch.ops.aten

_LOG_SOFTMAX, _CAST = aten._log_softmax.default, aten._to_copy.default


def find_losses(graph: fx.Graph) -> list[fx.Node]:
    """The negative log-likelihoods whose log-softmax over the second of two axes nothing else reads."""
    return [
        node for node in graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default) if _is_cross_entropy(node)
    ]


def _is_cross_entropy(node: fx.Node) -> bool:
    source, _, weight, reduction, _ = node.args
    assert isinstance(source, fx.Node)
    if source.target is not _LOG_SOFTMAX or weight is not None or reduction == 0 or len(source.users) > 1:
        return False
    return source.meta["val"].dim() == 2 and source.args[1] in (1, -1)


def share_losses(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with each of `find_losses` computed a share of the rows at a time."""
    fresh = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    losses = set(find_losses(graph))
    for node in graph.nodes:
        if node in losses:
            copies[node] = _shared(fresh, node, copies)
        else:
            copies[node] = fresh.node_copy(node, lambda n: copies[n])
    eliminate_dead_code(fresh)
    fresh.lint()
    return fresh


def _shared(fresh: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    log_softmax, target, _, reduction, ignore_index = node.args
    assert isinstance(log_softmax, fx.Node)
    assert isinstance(target, fx.Node)
    read = log_softmax.args[0]
    assert isinstance(read, fx.Node)
    dtype, logits = read.meta["val"].dtype, _before_cast(read)
    rows = copies[logits]
    if logits is not read:
        rows = fresh.call_function(aten.view.default, (rows, list(read.meta["val"].shape)))
        rows.meta.update(read.meta, val=logits.meta["val"].view(read.meta["val"].shape))
    call = fresh.call_function(
        cross_entropy._opoverload, (rows, copies[target], dtype, log_softmax.args[2], reduction, ignore_index), name=node.name
    )
    call.meta.update(node.meta)
    return call


def _before_cast(node: fx.Node) -> fx.Node:
    """What is cast to the dtype that the softmax is computed in, where only the softmax reads the cast."""
    source = node
    while is_view(source) and len(source.users) == 1:
        source = source.all_input_nodes[0]
    if source.target is not _CAST or len(source.users) > 1 or set(source.kwargs) != {"dtype"}:
        return node
    before = source.all_input_nodes[0]
    return before if before.meta["val"].is_contiguous() else node
