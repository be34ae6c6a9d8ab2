"""Split a joint graph by a plan: forward and backward graphs, each recomputed node just before its first reader.

The two halves come from the helpers of `torch._functorch.partitioners`; they put all recompute at the start of backward,
which is where torch's ratio budget loses its memory, so the order is mended here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat.ops import OFFLOAD, RELEASE, RELOAD, WAIT
from remat.passes.aliasing import is_view, results, storage_roots
from remat.passes.joint_program import JointHalves
from remat.passes.ordering import just_in_time
from remat.passes.regions import decision_policy

_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def partition(
    joint: fx.GraphModule,
    halves: JointHalves,
    dropped: frozenset[str],
    repeats: Mapping[str, int],
    moved: Mapping[str, tuple[str, str]],
    num_fwd_outputs: int,
    static_lifetime_input_indices: Sequence[int] | None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and backward modules in AOTAutograd's calling convention. `dropped` names forward nodes to recompute,
    `repeats` those among them to compute more than once (see `just_in_time`), `moved` those whose results wait on the host (see
    `move`)."""
    saved = [node if node.name in moved else _as_matrix(node) for node in _saved_values(joint.graph, halves, dropped)]
    for node in halves.forward:
        node.meta["recompute"] = decision_policy(node.name in dropped)
    forward, backward = _torch.extract_forward_backward(joint, saved, num_fwd_outputs, static_lifetime_input_indices)
    just_in_time(backward, repeats, {node.name for node in halves.inlined})
    move(forward, backward, num_fwd_outputs, moved)
    return forward, backward


def move(forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int, moved: Mapping[str, tuple[str, str]]) -> None:
    """Let values wait on the host between the halves, in place.

    moved: by name of the saved nodes that do, the forward node after which their device memory goes, and the backward node
        before which the copy back starts, "" for its first reader.
    """
    if not moved:
        return
    _move_out(forward, num_fwd_outputs, moved)
    _move_back(backward, moved)


def _move_out(forward: fx.GraphModule, num_fwd_outputs: int, moved: Mapping[str, tuple[str, str]]) -> None:
    outputs = list(results(forward.graph))
    order = {node: i for i, node in enumerate(forward.graph.nodes)}
    named = {node.name: node for node in order}
    for index in range(num_fwd_outputs, len(outputs)):
        node = outputs[index]
        if not isinstance(node, fx.Node) or node.name not in moved:
            continue
        readers = [user for user in node.users if user in order and user.op != "output"]
        last = max([node, *readers, named.get(moved[node.name][0], node)], key=order.__getitem__)
        with forward.graph.inserting_after(node):
            host = outputs[index] = forward.graph.call_function(OFFLOAD, (node, node.meta["val"].stride()))
        host.meta["val"] = _on_host(node.meta["val"])
        with forward.graph.inserting_after(host if last is node else last):
            forward.graph.call_function(RELEASE, (node, host)).meta["val"] = None
    forward.graph.output_node().args = (tuple(outputs),)
    forward.recompile()


def _move_back(backward: fx.GraphModule, moved: Mapping[str, tuple[str, str]]) -> None:
    order = {node: i for i, node in enumerate(backward.graph.nodes)}
    named = {node.name: node for node in order}
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name not in moved:
            continue
        value, users = node.meta["val"], sorted(node.users, key=order.__getitem__)
        start = min([users[0], named.get(moved[node.name][1], users[0])], key=order.__getitem__)
        with backward.graph.inserting_before(start):
            back = backward.graph.call_function(RELOAD, (node, value.shape, value.stride(), value.device))
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        with backward.graph.inserting_before(users[0]):
            backward.graph.call_function(WAIT, (back,)).meta["val"] = None
        node.meta["val"] = _on_host(value)
        back.meta["val"] = value
    backward.recompile()


def _on_host(value: Any) -> Any:
    with value.fake_mode:
        return OFFLOAD(value, value.stride())


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


def _as_matrix(node: fx.Node) -> fx.Node:
    """The one view of other dimensions that a value of four is read by, else the value: in nets with convolutions Inductor
    takes all that leaves forward with four dimensions for images, and stores them with channels last."""
    reader, *others = node.users
    if others or node.op == "placeholder" or reader.target not in _RESHAPES or reader.args[0] is not node:
        return node
    return reader if node.meta["val"].dim() == 4 != reader.meta["val"].dim() else node
