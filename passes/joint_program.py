"""From AOTAutograd's joint graph to a `Program`: what the partitioned graphs will hold, op by op.

The forward half is what the forward's outputs need; everything else runs in backward. Lifetimes are those of the graph: a
storage dies with its last reader. With `fuses`, pointwise ops that only feed other pointwise ops or reductions are taken to
be inlined into them, as Inductor does, and occupy nothing unless they are saved.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from remat.cost import DeviceProfile, op_cost_us
from remat.passes.aliasing import is_view, storage_bytes, storage_roots
from remat.passes.pinning import why_pinned
from remat.passes.randomness import is_random
from remat.program import Fixed, Op, Program, Value
from remat.workspace import Call, workspace_bytes

aten, prims = torch.ops.aten, torch.ops.prims

_SEEDS = {"inductor_seed", "inductor_seeds"}


@dataclass(frozen=True)
class JointHalves:
    """The call nodes of a joint graph in running order. `forward[i]` is position i of the program."""

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    forward_outputs: tuple[fx.Node, ...]
    backward_outputs: tuple[fx.Node, ...]


def split_joint(graph: fx.Graph, num_fwd_outputs: int) -> JointHalves:
    """Tell forward from backward: forward is what the first `num_fwd_outputs` outputs need."""
    outputs = [o for o in graph.output_node().args[0]]
    forward_outputs = tuple(o for o in outputs[:num_fwd_outputs] if isinstance(o, fx.Node))
    backward_outputs = tuple(o for o in outputs[num_fwd_outputs:] if isinstance(o, fx.Node))
    forward = _ancestors(forward_outputs)
    needed = _ancestors(backward_outputs)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node in calls:  # an output of a forward op belongs to forward even if only backward reads it
        if node.target is operator.getitem and node.args[0] in forward:
            forward.add(node)
    return JointHalves(
        tuple(n for n in calls if n in forward),
        tuple(n for n in calls if n in needed and n not in forward),
        forward_outputs,
        backward_outputs,
    )


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def joint_program(graph: fx.Graph, halves: JointHalves, device: DeviceProfile, resident_bytes: int, fuses: bool) -> Program:
    """The step as numbers. Outputs of forward are held to the end of the step, and so are the gradients."""
    roots = storage_roots(graph)
    position = {node: p for p, node in enumerate([*halves.forward, *halves.backward])}
    n_forward, end = len(halves.forward), len(position)
    inlined = _inlined(halves) if fuses else frozenset()
    readers = _storage_readers(graph, roots, inlined)
    escaping = {roots[node] for node in halves.forward_outputs}
    grads = {roots[node] for node in halves.backward_outputs}
    values, outputs, fixed = [], {}, []
    for node in (*halves.forward, *halves.backward):
        if roots[node] is not node or _is_parameterless_view(node):
            continue
        for item, size in _storages(node):
            uses = sorted(position[r] for r in readers.get(item, ()) if r in position)
            born = position[node]
            if born >= n_forward:
                dies = end if item in grads or node in grads else max([born, *uses])
                fixed.append(Fixed(born, dies, 0 if node in inlined else size))
                continue
            held = item in escaping
            before = [p for p in uses if p < n_forward]
            after = tuple(p for p in uses if p >= n_forward)
            outputs.setdefault(born, []).append(len(values))
            values.append(
                Value(
                    item.name,
                    size,
                    born,
                    end if held else max([born, *before]),
                    after,
                    after[-1] if after else -1,
                    "an output of the model" if held else _pin(node, fuses),
                    0 if node in inlined and not held else None,
                )
            )
    index = {value.name: v for v, value in enumerate(values)}
    for tangent in graph.nodes:
        if tangent.op == "placeholder" and "tangent" in tangent.name:
            uses = [position[r] for r in readers.get(tangent, ()) if r in position]
            fixed.append(Fixed(n_forward, max([n_forward, *uses]), storage_bytes(tangent.meta.get("val"))))
    forward = tuple(_op(node, p, outputs, index, roots, device, inlined, fuses) for p, node in enumerate(halves.forward))
    backward = tuple(_op(node, -1, {}, {}, roots, device, inlined, fuses) for node in halves.backward)
    return Program(forward, (*backward, Op("end of step", 0.0, 0)), tuple(values), tuple(fixed), resident_bytes)


def _is_parameterless_view(node: fx.Node) -> bool:
    return is_view(node) or node.target is operator.getitem


def _storages(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The storages that a node allocates: itself, or the items of its several outputs."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [(node, storage_bytes(value))]
    if not isinstance(value, tuple | list):
        return []
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [(items[i], storage_bytes(v)) for i, v in enumerate(value) if i in items]


def _storage_readers(graph: fx.Graph, roots: dict[fx.Node, fx.Node], inlined: frozenset[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each storage the ops that read it, through views, items, and ops inlined into their readers."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        found: dict[fx.Node, None] = {}
        for user in node.users:
            if user.op != "call_function":
                continue
            if is_view(user) or user in inlined:
                found.update(dict.fromkeys(readers.get(user, ())))
            if not is_view(user):
                found[user] = None
        readers[node] = list(found)
    return readers


def _pin(node: fx.Node, fuses: bool) -> str:
    if getattr(node.target, "__name__", "").split(".")[0] in _SEEDS:
        return "a seed: the draw may be repeated, the seed may not"
    if is_random(node) and not fuses:
        return "random: its result is saved so that backward sees the same draw"
    return why_pinned(node, frozenset())


def _inlined(halves: JointHalves) -> frozenset[fx.Node]:
    """Pointwise nodes all of whose readers are pointwise or reductions: Inductor stores none of them."""
    outputs = {*halves.forward_outputs, *halves.backward_outputs}
    inlined: set[fx.Node] = set()
    for node in reversed([*halves.forward, *halves.backward]):
        if not is_pointwise(node) or node in outputs:
            continue
        if all(_fuses_into(user, outputs, set()) for user in node.users):
            inlined.add(node)
    return frozenset(inlined)


def _fuses_into(user: fx.Node, outputs: set[fx.Node], seen: set[fx.Node]) -> bool:
    if user.op != "call_function" or user in outputs:
        return False
    if is_view(user):
        return all(_fuses_into(reader, outputs, seen) for reader in user.users)
    return is_pointwise(user) or is_reduction(user)


_POINTWISE_ANYWAY = {"where", "_to_copy", "clone", "full", "iota", "scalar_tensor", "cat", "constant_pad_nd", "convert_element_type",
                     "inductor_random", "inductor_lookup_seed", "gather", "index", "embedding", "slice_scatter", "full_like"}  # fmt: skip
_REDUCTIONS = {"sum", "mean", "amax", "amin", "var", "var_mean", "any", "all", "prod", "argmax", "argmin"}


def is_pointwise(node: fx.Node) -> bool:
    """True if Inductor computes each element of the result on its own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.__name__.split(".")[0]
    return torch.Tag.pointwise in node.target.tags or name in _POINTWISE_ANYWAY


def is_reduction(node: fx.Node) -> bool:
    """True if Inductor computes the result as a reduction."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.__name__.split(".")[0] in _REDUCTIONS


def _op(
    node: fx.Node,
    position: int,
    outputs: dict[int, list[int]],
    index: dict[str, int],
    roots: dict[fx.Node, fx.Node],
    device: DeviceProfile,
    inlined: frozenset[fx.Node],
    fuses: bool,
) -> Op:
    own = tuple(outputs.get(position, ()))
    if is_view(node) or node.target is operator.getitem:
        return Op(node.name, 0.0, 0)
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, dict(node.kwargs)))
    cost = _cost(node, args, kwargs, device, node in inlined)
    scratch = 0 if fuses and (is_pointwise(node) or is_reduction(node)) else workspace_bytes(Call.of(node.target, args, kwargs))
    reads = sorted({v for source in node.all_input_nodes for v in _values_of(source, roots, index)})
    launch = 0.0 if node in inlined else device.recompute_launch_us
    return Op(node.name, cost, scratch, tuple(reads) if own else (), own, launch if own else 0.0)


def _values_of(source: fx.Node, roots: dict[fx.Node, fx.Node], index: dict[str, int]) -> list[int]:
    names = [source.name]
    node = source
    while is_view(node):
        node = node.all_input_nodes[0]
        names.append(node.name)
    return [index[name] for name in names[-1:] if name in index]


def _cost(node: fx.Node, args: Any, kwargs: Any, device: DeviceProfile, inlined: bool) -> float:
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0.0
    value = node.meta.get("val")
    full = op_cost_us(node.target, tuple(args), dict(kwargs), value, device)
    if not inlined:
        return full
    return 0.1 * full
