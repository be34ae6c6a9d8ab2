"""Split a joint graph by a plan: forward and backward graphs, each recomputed node just before its first reader.

The two halves come from the helpers of `torch._functorch.partitioners`; they put all recompute at the start of backward,
which is where torch's ratio budget loses its memory, so the order is mended here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from remat import _torch
from remat.passes.aliasing import is_view, storage_roots
from remat.passes.joint_program import JointHalves
from remat.passes.regions import decision_policy


def partition(
    joint: fx.GraphModule,
    halves: JointHalves,
    dropped: frozenset[str],
    num_fwd_outputs: int,
    static_lifetime_input_indices: Sequence[int] | None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and backward modules in AOTAutograd's calling convention. `dropped` names forward nodes to recompute."""
    saved = _saved_values(joint.graph, halves, dropped)
    for node in halves.forward:
        node.meta["recompute"] = decision_policy(node.name in dropped)
    forward, backward = _torch.extract_forward_backward(joint, saved, num_fwd_outputs, static_lifetime_input_indices)
    just_in_time(backward)
    return forward, backward


def _saved_values(graph: fx.Graph, halves: JointHalves, dropped: frozenset[str]) -> list[fx.Node]:
    """The nodes to hand from forward to backward: what backward reads and what recompute starts from, views by their base."""
    roots = storage_roots(graph)
    in_forward = set(halves.forward)
    saved: dict[fx.Node, None] = {}
    visited: set[fx.Node] = set()
    stack = [source for node in halves.backward for source in node.all_input_nodes]
    stack += list(halves.backward_outputs)
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        if node.op == "placeholder":
            if "tangent" not in node.name:
                saved[node] = None
        elif node in in_forward:
            if is_view(node) or roots[node].name in dropped:
                stack.extend(node.all_input_nodes)
            else:
                saved[node] = None
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(saved, key=order.__getitem__)


def just_in_time(module: fx.GraphModule) -> None:
    """Reorder a backward graph in place: what needs no tangent runs just before the first node that reads it."""
    graph = module.graph
    late = _reached_by_tangents(graph)
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def emit(root: fx.Node) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            missing = [s for s in node.all_input_nodes if s not in placed]
            if missing and node not in placed:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if node not in placed:
                placed.add(node)
                order.append(node)

    for node in graph.nodes:
        if node.op == "placeholder":
            placed.add(node)
            order.append(node)
    for node in graph.nodes:
        if node in late:
            emit(node)
    output = graph.output_node()
    emit(output)
    fresh = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in order:
        copies[node] = fresh.node_copy(node, lambda n: copies[n])
    copies[output].meta.update(output.meta)
    fresh._codegen = graph._codegen
    module.graph = fresh
    module.recompile()


def _reached_by_tangents(graph: fx.Graph) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if "tangent" in node.name:
                reached.add(node)
        elif node.op == "call_function" and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached
