"""From AOTAutograd's joint graph to a `Program`: what the partitioned graphs will hold, op by op.

The forward half is what the forward's outputs need; everything else runs in backward. Lifetimes are those of the graph: a
storage dies with its last reader. With `fuses`, pointwise ops that only feed other pointwise ops or reductions are taken to
be inlined into them, as Inductor does: they occupy nothing unless they are saved, and computing them again costs their
arithmetic only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from remat._torch import TANGENTS_GO, InputMutationAOTOutput, OpOverload, pytree
from remat.cost import arithmetic_us, op_cost_us
from remat.devices import DeviceProfile
from remat.op_times import OpTimes
from remat.passes.aliasing import is_view, made_bytes, owner, picked_bytes, results, storage_bytes
from remat.passes.fusion import find_inlined, is_mask, is_pointwise, is_reduction, op_name
from remat.passes.layouts import channels_last, copied_bytes, is_convolution, prefers_channels_last
from remat.passes.ordering import as_needed
from remat.passes.overwriting import overwritten
from remat.passes.pinning import why_pinned
from remat.passes.provenance import module_path
from remat.passes.randomness import is_random
from remat.passes.subgraphs import held_by_loop, subgraph_bytes
from remat.passes.traffic import extra_bytes
from remat.program import HELD, Decision, Fixed, Op, Program, Value
from remat.workspace import Call, workspace_bytes

_SEEDS = {"inductor_seed", "inductor_seeds"}


@dataclass(frozen=True)
class JointHalves:
    """The call nodes of a joint graph in running order. `forward[i]` is position i of the program.

    `inlined` nodes are computed inside their readers and not stored, unless a node of forward is saved for backward. `fuses`: a
    compiler does so. `is_channels_last`: it lays out images with their channels last.
    """

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    inlined: frozenset[fx.Node]
    forward_outputs: tuple[fx.Node, ...]
    backward_outputs: tuple[fx.Node, ...]
    fuses: bool
    is_channels_last: bool


def split_joint(graph: fx.Graph, num_fwd_outputs: int, fuses: bool) -> JointHalves:
    """Tell forward from backward: forward is what the first `num_fwd_outputs` outputs need."""
    outputs = results(graph)
    forward_outputs = tuple(o for o in outputs[:num_fwd_outputs] if isinstance(o, fx.Node))
    backward_outputs = tuple(o for o in outputs[num_fwd_outputs:] if isinstance(o, fx.Node))
    forward = _ancestors(forward_outputs)
    needed = _ancestors(backward_outputs)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node in calls:  # an output of a forward op belongs to forward even if only backward reads it
        if node.target is operator.getitem and node.args[0] in forward:
            forward.add(node)
    first = tuple(n for n in calls if n in forward)
    second = as_needed([n for n in calls if n in needed and n not in forward], backward_outputs, graph)
    inlined = find_inlined((*first, *second), {*forward_outputs, *backward_outputs}) if fuses else frozenset()
    is_channels_last = fuses and prefers_channels_last(graph, set(second))
    return JointHalves(first, second, inlined, forward_outputs, backward_outputs, fuses, is_channels_last)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def joint_program(
    graph: fx.Graph,
    halves: JointHalves,
    device: DeviceProfile,
    resident: Mapping[str, int],
    times: OpTimes | None = None,
) -> Program:
    """The step as numbers. Outputs of forward are held to the end of the step, and so are the gradients.

    resident: bytes by kind. times: measured costs of ops; None: those of the device's profile.
    """
    position = {node: p for p, node in enumerate([*halves.forward, *halves.backward])}
    values, fixed = _lifetimes(graph, halves, position, device)
    fixed += _tangents(graph, halves, position, device)
    fixed.append(Fixed(0, len(position), device.slack_bytes(largest_value(values))))
    moments = tuple((position[node], node.name) for node in halves.backward)
    return Program(
        _forward_ops(halves, values, device, times),
        (*_backward_ops(halves, device, times), Op("end of step", 0.0, 0)),
        tuple(values),
        tuple(fixed),
        sum(resident.values()),
        moments,
        device.link,
        regions_hold=False,
        saved_stay=True,
        resident=tuple(resident.items()),
        modules=tuple(module_path(node) for node in halves.forward),
    )


def _lifetimes(
    graph: fx.Graph, halves: JointHalves, position: Mapping[fx.Node, int], device: DeviceProfile
) -> tuple[list[Value], list[Fixed]]:
    """What the ops of forward make, and what those of backward make."""
    n_forward, end = len(halves.forward), len(position)
    late = halves.inlined - set(halves.forward)
    readers = _storage_readers(graph, late)
    escaping = {owner(node) for node in halves.forward_outputs}
    grads = {owner(node) for node in halves.backward_outputs}
    over = _overwritten(graph, halves, escaping | grads) if halves.fuses else {}
    mutated = _mutated_inputs(graph)
    values: list[Value] = []
    fixed: list[Fixed] = []
    where: dict[fx.Node, int] = {}  # storages of forward among `values`, of backward among `fixed`
    for node, born in position.items():
        if is_view(node) or node.target is operator.getitem or node in late:
            continue
        for item, requested in _storages(node, halves.fuses):
            size = device.allocated_bytes(requested)
            uses = sorted(position[r] for r in readers.get(item, ()) if r in position)
            if born >= n_forward:
                is_gradient = item in grads
                dies = end if is_gradient else max([born, *uses])
                made = Fixed(born, dies, size, "gradients" if is_gradient else "working set")
                sources = [source for source in over.get(item, ()) if source in where]
                own = [where[source] for source in sources if position[source] >= n_forward]
                at = where[item] = next((at for at in own if fixed[at].dies == born), len(fixed))
                if at < len(fixed):
                    fixed[at] = made._replace(born=fixed[at].born, over=fixed[at].over)
                else:
                    fixed.append(made._replace(over=tuple(where[s] for s in sources if position[s] < n_forward)))
                continue
            held = item in escaping
            last_forward = end if held else max([born, *(p for p in uses if p < n_forward)])
            after = tuple(p for p in uses if p >= n_forward)
            release = after[-1] if after else -1
            pin = HELD if held else _pin(node, halves.fuses, mutated)
            passing = 0 if node in halves.inlined else None
            under = tuple(where[source] for source in over.get(item, ()) if source in where)
            where[item] = len(values)
            values.append(Value(item.name, size, born, last_forward, after, release, pin, passing, under))
    return values, fixed


def _mutated_inputs(graph: fx.Graph) -> frozenset[fx.Node]:
    """The inputs that the step writes to, within the graph or with what it returns: backward would read the new values."""
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    returned = graph.output_node().meta.get("desc", ())
    written = [desc.mutated_input for desc in returned if isinstance(desc, InputMutationAOTOutput)]
    inputs = graph.find_nodes(op="placeholder")
    return frozenset(node for node in inputs if node.meta.get("desc") in written).union(owner(copy.args[0]) for copy in copies)


def _overwritten(graph: fx.Graph, halves: JointHalves, kept: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    readers = _storage_readers(graph, halves.inlined)
    forward, backward = (overwritten(half, halves.inlined, readers, kept) for half in (halves.forward, halves.backward))
    return {**forward, **backward}


def _tangents(graph: fx.Graph, halves: JointHalves, position: Mapping[fx.Node, int], device: DeviceProfile) -> Iterator[Fixed]:
    """The gradients of the model's results, which backward starts from."""
    n_forward, end = len(halves.forward), len(position)
    readers = _storage_readers(graph, halves.inlined - set(halves.forward))
    for tangent in graph.find_nodes(op="placeholder"):
        if "tangent" in tangent.name:
            last = max((position[r] for r in readers[tangent] if r in position), default=n_forward)
            size = device.allocated_bytes(storage_bytes(tangent.meta.get("val")))
            yield Fixed(n_forward, last if TANGENTS_GO else end, size)


def _forward_ops(halves: JointHalves, values: Sequence[Value], device: DeviceProfile, times: OpTimes | None) -> tuple[Op, ...]:
    index = {value.name: v for v, value in enumerate(values)}
    made: dict[int, list[int]] = {}
    for v, value in enumerate(values):
        made.setdefault(value.op, []).append(v)
    extra = extra_bytes(halves.forward, halves.backward, halves.inlined)
    return tuple(
        _op(
            node,
            tuple(made.get(p, ())),
            [index[name] for name in _sources(node) if name in index],
            device,
            halves,
            extra.get(node),
            times,
        )
        for p, node in enumerate(halves.forward)
    )


def _backward_ops(halves: JointHalves, device: DeviceProfile, times: OpTimes | None) -> Iterator[Op]:
    """Each with the forward op whose gradient it is for, told by autograd's sequence numbers."""
    made_by = {node.meta["seq_nr"]: p for p, node in reversed(list(enumerate(halves.forward))) if "seq_nr" in node.meta}
    for node in halves.backward:
        op = _op(node, (), [], device, halves, 0 if node in halves.inlined else None, times)
        yield op._replace(origin=made_by.get(node.meta.get("seq_nr"), -1))


def largest_value(values: Sequence[Value]) -> int:
    """Bytes of the largest one."""
    return max((value.bytes for value in values), default=0)


def _storages(node: fx.Node, fuses: bool) -> list[tuple[fx.Node, int]]:
    """The storages that a node allocates: itself, or the items of its several outputs."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [(node, picked_bytes(node) or (storage_bytes(value) if fuses else made_bytes(node)))]
    return _item_storages(node)


def _item_storages(node: fx.Node) -> list[tuple[fx.Node, int]]:
    value = node.meta.get("val")
    if not isinstance(value, tuple | list):
        return []
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [(items[i], storage_bytes(v)) for i, v in enumerate(value) if i in items]


def _unread_bytes(node: fx.Node) -> int:
    """Of the outputs, among several, that no item reads: they are gone when the op has run."""
    value = node.meta.get("val")
    if not isinstance(value, tuple | list):
        return 0
    return sum(map(storage_bytes, value)) - sum(size for _, size in _item_storages(node))


def _storage_readers(graph: fx.Graph, inlined: frozenset[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each storage the ops that read it, through views, items, and ops inlined into their readers."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        found: dict[fx.Node, None] = {}
        for user in node.users:
            if user.op != "call_function":
                continue
            if is_view(user) or user in inlined:
                found.update(dict.fromkeys(readers.get(user, ())))
            else:
                found[user] = None
        readers[node] = list(found)
    return readers


def _scratch_bytes(node: fx.Node, args: Any, kwargs: Any, halves: JointHalves, device: DeviceProfile) -> int:
    if halves.fuses and (is_pointwise(node) or is_reduction(node)):
        return 0
    copied = 0
    if halves.is_channels_last and is_convolution(node):
        args, copied = channels_last(args), copied_bytes(node)
    return workspace_bytes(Call.of(node.target, args, kwargs)) + device.allocated_bytes(_unread_bytes(node) + copied)


def _pin(node: fx.Node, fuses: bool, mutated: frozenset[fx.Node]) -> str:
    if op_name(node) in _SEEDS:
        return "a seed: the draw may be repeated, the seed may not"
    if is_random(node) and not fuses:
        return "random: its result is saved so that backward sees the same draw"
    return why_pinned(node, mutated)


def _sources(node: fx.Node) -> list[str]:
    """Names of the values that computing a node reads, through views, in the order of its arguments."""
    return list(dict.fromkeys(owner(source).name for source in node.all_input_nodes))


def _op(
    node: fx.Node,
    own: tuple[int, ...],
    reads: list[int],
    device: DeviceProfile,
    halves: JointHalves,
    extra: int | None,
    times: OpTimes | None,
) -> Op:
    """extra: for what is inlined, the memory traffic in bytes that this adds (`extra_bytes`)."""
    if is_view(node) or node.target is operator.getitem:
        return Op(node.name, 0.0, 0)
    if not isinstance(node.target, OpOverload):  # a higher-order op, never recomputed
        scratch = subgraph_bytes(node, device.allocated_bytes) + device.allocated_bytes(_unread_bytes(node))
        return Op(node.name, 0.0, scratch + (0 if halves.fuses else held_by_loop(node)), tuple(reads), own)
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, dict(node.kwargs)))
    result: Any = node.meta.get("val")
    if extra is not None:
        arithmetic = float(arithmetic_us(node.target, result.numel(), device))  # sizes may be symbols
        cost = max(0.0, arithmetic + extra / device.bytes_per_us)
    else:
        cost = float(op_cost_us(node.target, tuple(args), dict(kwargs), result, device))
        if times is not None and (call := Call.of(node.target, args, kwargs)) is not None:
            cost = times.time_us(call, cost)
    scratch = _scratch_bytes(node, args, kwargs, halves, device)
    if not own:
        return Op(node.name, cost, scratch)
    launch = 0.0 if extra is not None else device.recompute_launch_us
    pin = Decision.RECOMPUTE if extra is not None and device.fused_random_ns_per_element and is_mask(node) else None
    return Op(node.name, cost, scratch, tuple(reads), own, launch, pin=pin)
