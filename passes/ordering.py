"""The order of joint and backward graphs, for a small peak."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from remat.passes.aliasing import is_view, results, storage_roots
from remat.passes.fusion import stored_on_reuse

_COPIES = 64  # of nodes, for one that reads them
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def parameters_first(graph: fx.Graph, num_fwd_outputs: int) -> None:
    """Compute backward's results once the gradients that they are computed from are there, in place.

    AOTAutograd has the gradient of a matrix product's input come before that of its weight. The other way round, the
    activation that the weight's gradient reads is gone when the input's is allocated. Collectives stay where they are.
    """
    late, ends = _reached_by_tangents(graph), _ends(graph, num_fwd_outputs)
    placed = set(graph.find_nodes(op="placeholder"))
    for node in list(graph.nodes):
        if node in placed:
            continue
        placed.add(node)
        last, fresh = node, [node] if node in late else []
        while fresh:
            for user in fresh.pop().users:
                if user in placed or user not in ends or any(s in late and s not in placed for s in user.all_input_nodes):
                    continue
                for needed in _missing(user, placed):
                    last.append(needed)
                    last = needed
                fresh.append(user)


def _ends(graph: fx.Graph, num_fwd_outputs: int) -> set[fx.Node]:
    """The ops that backward's results come from, views and casts between them, and the views that only they read."""
    forward = set(results(graph)[:num_fwd_outputs])
    after, ops, before = {graph.output_node()}, set[fx.Node](), set[fx.Node]()
    for node in reversed(graph.nodes):
        if getattr(node.target, "namespace", "") not in ("aten", "prims") or node in forward or not node.users:
            continue
        if after.issuperset(node.users):
            (after if is_view(node) or node.target in _CASTS else ops).add(node)
        elif is_view(node) and all(user in ops or user in before for user in node.users):
            before.add(node)
    return (after | ops | before) - {graph.output_node()}


def as_needed(backward: Sequence[fx.Node], outputs: Sequence[fx.Node], graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes of backward in the order that `just_in_time` runs them in: those that need no tangent, such as copies that
    autograd took in forward, just before the first node that reads them."""
    late = _reached_by_tangents(graph)
    placed = set(graph.nodes).difference(backward)
    return tuple(found for node in (*filter(late.__contains__, backward), *outputs) for found in _missing(node, placed))


def just_in_time(module: fx.GraphModule, repeats: Mapping[str, int] | None = None, inlined: Collection[str] = ()) -> None:
    """Reorder a backward graph in place: what needs no tangent runs just before the first node that reads it.

    repeats: by name of such nodes how often their results are let go of after the node that they were computed for, to be
        computed again for the next one (`remat.schedule`).
    inlined: names of nodes that a compiler computes inside their readers, for which such results are then computed. What it
        would store since it has several readers (`stored_on_reuse`) each of them gets a copy of.
    """
    graph = module.graph
    late, roots = _reached_by_tangents(graph), storage_roots(graph)
    left = {node: repeats[node.name] for node in graph.nodes if repeats and node.name in repeats}
    fused = {node for node in late if left and node.name in inlined}
    copied = stored_on_reuse(node for node in graph.nodes if is_view(node) or node.name in inlined)
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    for node in graph.nodes:
        if node.op == "placeholder":
            placed.add(node)
            order.append(node)
    output = graph.output_node()
    for node in graph.nodes:
        if node is not output and (node not in late or node in fused or node in copied):
            continue
        group = _missing(node, placed, copied)
        order += group
        used = {roots[source] for member in group for source in (member, *member.all_input_nodes)}
        for repeated in [node for node in left if node in used and left[node]]:
            left[repeated] -= 1
            placed -= _computed_with(repeated, roots, fused)
        placed -= copied
    fresh = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in order:
        name = f"{node.name}_again" if node in copies else node.name
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = fresh.create_node(node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta = node.meta.copy()
    copies[output].meta.update(output.meta)
    for copy in reversed(fresh.find_nodes(op="call_function", target=operator.getitem)):
        if not copy.users:  # an item that only another copy's readers wanted: `fx.Interpreter` would hold it to the end
            fresh.erase_node(copy)
    fresh._codegen = graph._codegen
    module.graph = fresh
    module.recompile()


def _computed_with(node: fx.Node, roots: Mapping[fx.Node, fx.Node], fused: Collection[fx.Node]) -> set[fx.Node]:
    """A node, its views and items, and what a compiler computes from these inside its readers."""
    found, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in found and (user in fused or roots[user] in found):
                found.add(user)
                stack.append(user)
    return found


def _missing(root: fx.Node, placed: set[fx.Node], copied: Collection[fx.Node] = ()) -> list[fx.Node]:
    """What has to be placed with a node, in order, up to itself; it is placed then. Items come with the op of several results
    that they are of: as long as one is missing, all of them are held. Each reader has its own of what is `copied`, unless that
    is too many."""
    order: list[fx.Node] = []
    n_copied = 0
    stack = [root]
    while stack:
        node = stack[-1]
        missing = [s for s in node.all_input_nodes if s not in placed]
        if missing and node not in placed:
            stack.extend(reversed(missing))
            continue
        stack.pop()
        if node not in placed:
            items = [user for user in node.users if user.target is operator.getitem and user not in placed]
            n_copied += node in copied
            if n_copied < _COPIES:
                placed.difference_update(source for source in node.all_input_nodes if source in copied)
            placed.update((node, *items))
            order += [node, *items]
    return order


def _reached_by_tangents(graph: fx.Graph) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if "tangent" in node.name:
                reached.add(node)
        elif node.op == "call_function" and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached
