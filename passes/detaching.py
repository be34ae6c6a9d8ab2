"""Rewrite a forward graph: what no gradient can reach reads detached tensors, so that autograd keeps nothing of it."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def detach_without_gradient(graph: fx.Graph, trained: Container[fx.Node]) -> set[fx.Node]:
    """Cut off parts of the graph whose results are detached, or are numbers that have no gradient.

    Eagerly such a part keeps what its backward would read until its last tensor goes (accuracies, stopped gradients, targets
    of another network). trained: the placeholders that require grad. Returns the nodes whose results may have a gradient.
    """
    recorded: set[fx.Node] = set()  # what autograd has a gradient for
    for node in graph.nodes:
        reads = node in trained if node.op == "placeholder" else any(n in recorded for n in node.all_input_nodes)
        if reads and not _ends_gradients(node):
            recorded.add(node)
    reached = {node for node in graph.output_node().all_input_nodes if node in recorded}
    for node in reversed(graph.nodes):
        if node in reached:
            reached.update(n for n in node.all_input_nodes if n in recorded)
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        if node in recorded and node.args[0] in reached:
            reached.add(node)  # what reads it can be cut off, a tuple cannot
    cuts: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node not in recorded or node in reached:
            continue
        for source in [n for n in node.all_input_nodes if n in recorded and (n in reached or n.op == "placeholder")]:
            if source not in cuts:
                with graph.inserting_before(node):
                    cuts[source] = graph.call_function(aten.detach.default, (source,))
                cuts[source].meta.update(
                    {name: source.meta[name] for name in ("val", "nn_module_stack") if name in source.meta}
                )
            node.replace_input_with(source, cuts[source])
    return reached


def _ends_gradients(node: fx.Node) -> bool:
    return node.target is aten.detach.default or not _can_have_gradient(node.meta.get("val"))


def _can_have_gradient(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_can_have_gradient, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
