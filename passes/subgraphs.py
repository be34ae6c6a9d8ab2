"""Ops that run a graph of their own: `torch.cond` and its like, and regions marked to be compiled once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from remat._torch import invoke_subgraph, pytree
from remat.passes.aliasing import results, storage_bytes, storage_roots


def inline_regions(gm: fx.GraphModule) -> None:
    """Put the ops of regions (`torch.compiler.nested_compile_region`) into the graph that calls them, so that one plan decides
    about all of them. Compiled once, they would save the same in every call, whatever the budget of the step."""
    while calls := gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        for call in calls:
            _inline(gm, call)
        gm.recompile()


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    attribute = call.all_input_nodes[0]
    region = getattr(gm, str(attribute.target))
    inputs: dict[Any, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
    with gm.graph.inserting_before(call):
        found: Any = gm.graph.graph_copy(region.graph, inputs)
    for node in region.graph.find_nodes(op="get_attr"):  # graphs within the region
        inputs[node].target = f"{call.name}_{node.target}"
        setattr(gm, inputs[node].target, getattr(region, node.target))
    for item in list(call.users):
        assert item.target is operator.getitem, "a region returns a tuple"
        item.replace_all_uses_with(found[item.args[1]])
        gm.graph.erase_node(item)
    gm.graph.erase_node(call)
    if not attribute.users:
        gm.graph.erase_node(attribute)


def subgraph_bytes(node: fx.Node, allocated: Callable[[int], int]) -> int:
    """The most that a graph of the node's allocates beyond its results. `allocated`: a block's size by what is asked for."""
    return max((_scratch_bytes(graph, allocated) for graph in _graphs(node)), default=0)


def _graphs(node: fx.Node) -> list[fx.Graph]:
    module = node.graph.owning_module
    names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return [found.graph for name in names if isinstance(found := getattr(module, name, None), fx.GraphModule)]


def held_by_loop(node: fx.Node) -> int:
    """What torch's loops hold beside their results and what one run of their graph allocates, where they run as they are.

    A `while_loop` has the values it carries from before a run and from after it. A `scan` has the first slice of each result,
    the last and the next one, and indices of int64 for each and for one more.
    """
    if "while_loop" in str(node.target):
        return _bytes(node)
    if node.target is not torch.ops.higher_order.scan:
        return 0
    (graph,) = _graphs(node)
    carried: Any = node.args[1]
    following, slices = results(graph)[: len(carried)], results(graph)[len(carried) :]
    slices = tuple(found for found in slices if isinstance(found, fx.Node))  # None where there is no gradient
    indices = [8 * found.meta["val"].numel() for found in slices]
    return sum(map(_bytes, following)) + 3 * sum(map(_bytes, slices)) + sum(indices) + max(indices, default=0)


def _bytes(node: fx.Node) -> int:
    return sum(map(storage_bytes, pytree.tree_leaves(node.meta.get("val"))))


def _scratch_bytes(graph: fx.Graph, allocated: Callable[[int], int]) -> int:
    roots = storage_roots(graph)
    size = {
        node: sum(allocated(storage_bytes(leaf)) for leaf in pytree.tree_leaves(node.meta.get("val"))) for node in graph.nodes
    }
    last = {roots[source]: node for node in graph.nodes for source in node.all_input_nodes}
    live = peak = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        live += size[node] if roots[node] is node else 0
        peak = max(peak, live + subgraph_bytes(node, allocated))
        done = {root for root in (node, *map(roots.__getitem__, node.all_input_nodes)) if last.get(root, node) is node}
        live -= sum(size[root] for root in done if root.op == "call_function" and roots[root] is root)
    return peak - live
