"""The forward half of AOTAutograd's joint graph as a graph of its own, that says where each input comes from."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx, nn

from remat import _torch
from remat._torch import pytree
from remat.captured import Captured, Source, attribute, tensor_of
from remat.errors import CaptureError
from remat.export import DOOR_2
from remat.functions import FunctionCall
from remat.passes.aliasing import results
from remat.passes.derivatives import elu_from_results
from remat.passes.detaching import detach_without_gradient
from remat.passes.native_layouts import copy_for_views
from remat.passes.randomness import eliminate_dead_code
from remat.state import PLAIN, tensor_key

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_WRONG_AGAIN = (
    torch.ops.aten.rrelu_with_noise_functional.default,  # its derivative takes the noise from before the draw
    torch.ops.aten.as_strided_scatter.default,  # its derivative lets the gradient of what was written over through
)


def forward_half(
    joint: fx.GraphModule,
    exported: fx.GraphModule,
    model: nn.Module,
    flat: list[Any],
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
    constant_outputs: dict[int, Any],
) -> Captured:
    """What the joint graph of `exported`, which `model` was flattened to for a call with these leaves, runs in forward.

    specs: of the call's arguments and of its output, of whose leaves `constant_outputs` are not tensors.
    """
    positions = [i for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
    sources, constants, attributes = _inputs(joint.graph, exported, model, positions)
    graph, copied = _copied(joint.graph, sources)
    kept, by_index, mutations = _returned(joint.graph, copied, sources, positions)
    graph.output(tuple(kept))
    eliminate_dead_code(graph)
    _refuse_other_results(graph)
    _lift_constants(graph, joint, sources, constants)
    elu_from_results(graph, exported.graph)
    copy_for_views(graph)
    for node in graph.find_nodes(op="call_function", target=_BATCH_NORM):
        _free_running_statistics(node)
    trains = [tensor_of(source, model, flat, constants).requires_grad for source in sources.values()]
    for node in detach_without_gradient(graph, set(itertools.compress(graph.find_nodes(op="placeholder"), trains))):
        if node.target in _WRONG_AGAIN:
            raise CaptureError(f"{node.target} has another derivative in a graph than in the model; {DOOR_2}")
    tensors = itertools.count()
    outputs = tuple(
        (-1, constant_outputs[i]) if i in constant_outputs else (by_index[next(tensors)], None)
        for i in range(specs[1].num_leaves)
    )
    held = _held_by_functions(graph, model)
    return Captured(graph, tuple(sources.values()), *specs, outputs, tuple(mutations), constants, attributes, held)


def _inputs(
    joint: fx.Graph, exported: fx.GraphModule, model: nn.Module, positions: list[int]
) -> tuple[dict[fx.Node, Source], dict[str, torch.Tensor], dict[str, Any]]:
    """Where the joint graph's placeholders for forward come from; the constants and the model's attributes among them."""
    sources: dict[fx.Node, Source] = {}
    constants: dict[str, torch.Tensor] = {}
    attributes: dict[str, Any] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for node in joint.find_nodes(op="placeholder"):
        source = _source(node.meta["desc"], positions)
        if source is None:
            continue
        if source.kind == "buffer" and source.name not in buffers:
            tensor = attribute(exported, source.name)
            source = _unregistered(source.name, tensor, model)
            if source.kind == "attribute":
                attributes[source.name] = tensor_key(tensor)
            else:
                constants[source.name] = tensor
        sources[node] = source
    return sources, constants, attributes


def _copied(joint: fx.Graph, sources: dict[fx.Node, Source]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph of all that can be computed from those placeholders, without an output yet; the copy of each node."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in joint.nodes:
        is_forward = node in sources if node.op == "placeholder" else all(n in copied for n in node.all_input_nodes)
        if is_forward and node.op != "output":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    return graph, copied


def _lift_constants(
    graph: fx.Graph, joint: fx.GraphModule, sources: dict[fx.Node, Source], constants: dict[str, torch.Tensor]
) -> None:
    """Let the graph be given the constants that ops bring along, like all others."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        constants[name] = attribute(joint, name)
        if isinstance(constants[name], torch.Generator):
            raise CaptureError(f"the model draws from a generator of its own, of which no state is kept; {DOOR_2}")
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            given = graph.placeholder(name)
        given.meta.update(node.meta)
        node.replace_all_uses_with(given)
        graph.erase_node(node)
        sources[given] = Source("constant", name)


def _returned(
    joint: fx.Graph, copied: dict[fx.Node, fx.Node], sources: dict[fx.Node, Source], positions: list[int]
) -> tuple[list[fx.Node], dict[int, int], list[tuple[int, Source]]]:
    """What the forward half returns; of each of the model's tensors its position there, and which are new values of which
    inputs."""
    kept: list[fx.Node] = []
    by_index: dict[int, int] = {}
    mutations: list[tuple[int, Source]] = []
    known = set(sources.values())
    for node, desc in zip(results(joint), joint.output_node().meta["desc"], strict=True):
        if isinstance(desc, _torch.InputMutationAOTOutput):
            source = _source(desc.mutated_input, positions)
            assert source is not None
            if source not in known:
                raise CaptureError(
                    f"the model writes to its attribute {source.name}, a tensor that is no buffer; call "
                    f'register_buffer("{source.name.rpartition(".")[2]}", ...), or {DOOR_2}'
                )
            mutations.append((len(kept), source))
        elif isinstance(desc, _torch.PlainAOTOutput):
            by_index[desc.idx] = len(kept)
        else:
            continue
        kept.append(copied[node])
    return kept, by_index, mutations


def _held_by_functions(graph: fx.Graph, model: nn.Module) -> dict[tuple[str, str], Any]:
    given = [argument for node in graph.nodes if isinstance(node.target, FunctionCall) for argument in node.target.arguments]
    objects = {id(argument) for argument in given if type(argument) not in PLAIN}
    owned = ((name, *item) for name, parameter in model.named_parameters() for item in _torch.own_attributes(parameter).items())
    return {(name, own): value for name, own, value in owned if id(value) in objects}


def _unregistered(name: str, tensor: torch.Tensor, model: nn.Module) -> Source:
    """Where a tensor comes from that export calls a buffer, and that is none of the model's."""
    here = attribute(model, name)
    if isinstance(here, torch.Tensor) and here.requires_grad:
        raise CaptureError(f"{name} requires grad; make it an nn.Parameter, or {DOOR_2}")
    if here is tensor:
        return Source("attribute", name)
    return Source("constant", name.replace(".", "_"))  # no submodule of the original has it


def _refuse_other_results(graph: fx.Graph) -> None:
    """Ops whose results are more than tensors, or tensors of a layout that has no storage to count."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, _torch.HigherOrderOperator):
            raise CaptureError(f"{node.target} runs a graph or op of its own, which is planned for in compiled steps; {DOOR_2}")
        values = node.meta.get("val")
        if isinstance(values, tuple) and any(isinstance(value, list | tuple) for value in values):
            raise CaptureError(f"{node.target} returns a list among its results, for which there is no plan; {DOOR_2}")
        layouts = {value.layout for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)} - {torch.strided}
        if layouts:
            raise CaptureError(f"{node.target} returns a tensor of layout {layouts.pop()}, which has no plan; {DOOR_2}")


def _free_running_statistics(node: fx.Node) -> None:
    """Let batch norm read copies of its statistics: autograd saves them, and the step updates the originals."""
    with node.graph.inserting_before(node):
        for index in (3, 4):
            copy = node.graph.call_function(torch.ops.aten.clone.default, (node.args[index],))
            copy.meta.update(node.args[index].meta)  # type: ignore[union-attr]
            node.update_arg(index, copy)


def _source(desc: Any, positions: list[int]) -> Source | None:
    if isinstance(desc, _torch.ParamAOTInput):
        return Source("parameter", desc.target)
    if isinstance(desc, _torch.BufferAOTInput):
        return Source("buffer", desc.target)
    if isinstance(desc, _torch.PlainAOTInput):
        return Source("input", index=positions[desc.idx])
    if isinstance(desc, _torch.TangentAOTInput):
        return None
    if isinstance(desc, _torch.ViewBaseAOTInput):
        raise CaptureError("the model writes to one of its inputs, which shares memory with another; pass a clone of it")
    if isinstance(desc, _torch.ForwardTokenAOTInput):
        raise CaptureError(f"the model calls an op with effects, such as the checks of torch.linalg's solvers; {DOOR_2}")
    raise CaptureError(f"remat does not know how to feed {desc!r} to the captured graph; {DOOR_2}")
