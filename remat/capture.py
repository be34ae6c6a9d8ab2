"""From a module and example inputs to one functional forward graph.

`torch.export(strict=False)` sees through any Python the model is written in; AOTAutograd then turns the exported program
into ops that each have a derivative formula of their own, without mutation. The forward half of that joint graph is what
door 1 plans on and runs: node for node what autograd sees. What export would drop in silence (a model's own checkpoints)
is refused here; autograd functions are put back (`remat.function_capture`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from remat import _torch, patches
from remat._torch import pytree
from remat.differentiable import DECOMPOSITIONS
from remat.errors import CaptureError, RematError
from remat.export import DOOR_2, export
from remat.function_capture import capturing_functions
from remat.functions import FunctionCall
from remat.passes.aliasing import results
from remat.passes.detaching import detach_without_gradient
from remat.passes.randomness import argument
from remat.state import PLAIN, tensor_key

_BLOCKWISE = "; or block by block: remat.enable(model, budget, whole_model=False)"
_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_WRONG_AGAIN = (
    torch.ops.aten.rrelu_with_noise_functional.default,  # its derivative takes the noise from before the draw
    torch.ops.aten.as_strided_scatter.default,  # its derivative lets the gradient of what was written over through
)
_GRAPHS_OWN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_DROPPED = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn", "sym_constrain_range", "_assert_async")


@dataclass(frozen=True)
class Source:
    """Where a placeholder's tensor comes from: a parameter, buffer, other attribute or lifted constant by name, or flat input
    `index`."""

    kind: str
    name: str = ""
    index: int = -1


@dataclass(frozen=True)
class Captured:
    """A model's forward as one functional ATen graph.

    graph: placeholders in the order of `sources`; the output is the tuple of flat outputs, then the new values of
        mutated inputs.
    outputs: for each flat output of the model, its index among the graph's outputs, or the constant it always is.
    mutations: (index among the graph's outputs, source of the input it belongs to).
    attributes: of each tensor that is an attribute of the model's and neither parameter nor buffer, what it has to be like.
    held: attributes of parameters (by both names) that autograd functions are given.
    """

    graph: fx.Graph
    sources: tuple[Source, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    outputs: tuple[tuple[int, Any], ...]
    mutations: tuple[tuple[int, Source], ...]
    constants: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    held: dict[tuple[str, str], Any]

    def fits(self, model: nn.Module) -> bool:
        """Whether the graph can read the attributes of the model as they are now."""
        there = all(tensor_key(attribute(model, name)) == key for name, key in self.attributes.items())
        return there and all(attribute(model, f"{name}.{own}") is value for (name, own), value in self.held.items())

    def read_by_functions(self) -> list[torch.Tensor]:
        """What autograd functions read beside what they are given."""
        return [tensor for node in self.graph.nodes if isinstance(node.target, FunctionCall) for tensor in node.target.reads]

    def output_of(self, results: Sequence[Any]) -> Any:
        """The model's output, from what the graph returns."""
        return pytree.tree_unflatten([constant if i < 0 else results[i] for i, constant in self.outputs], self.out_spec)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: str = "") -> Captured:
    """Capture one training forward of `model`, or of the block of one that is at the path `block`. Raises CaptureError with the
    place and the way out."""
    try:
        return _captured(model, args, kwargs)
    except CaptureError as error:
        error.args = (f"block {block}: {error}" if block else f"{error}{_BLOCKWISE}",)
        raise


def check_model(model: Any, args: Any) -> None:
    """Raises RematError for what cannot be a model, or its inputs, or has been rewritten in place already."""
    if not isinstance(model, nn.Module):
        raise RematError(f"a {type(model).__name__} is no nn.Module; write one whose forward calls it")
    if not isinstance(args, tuple):
        raise RematError(f"args is a {type(args).__name__}; give a tuple of positional inputs, args=(x,)")
    lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise RematError(f"{lazy} has no shape yet, which lazy modules find in their first call; call the model once before")
    enabled = next((module for module in model.modules() if "_remat" in vars(module)), None)
    if enabled is not None:
        raise RematError(f"remat is enabled for {type(enabled).__name__} already; call remat.disable on it first")
    rewritten = next((path for path, module in model.named_modules() if path and "_original" in vars(module)), None)
    if rewritten is not None:
        raise RematError(f"{rewritten} comes from remat.optimize and has a plan already; put the original there")


@_torch.tracing_alone()
@patches.native_kernels()
def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    kwargs = dict(sorted(kwargs.items()))
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.numel()}
    if len(devices) > 1:
        raise CaptureError(f"the model is on several devices ({', '.join(sorted(map(str, devices)))}); remat plans for one")
    given = (("an input", leaf) for leaf in flat if isinstance(leaf, torch.Tensor))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers(), given):
        if tensor.layout is not torch.strided:
            raise CaptureError(f"{name} is a tensor of layout {tensor.layout}, for which there is no plan; {DOOR_2}")
        if _torch.is_traceable_wrapper_subclass(tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__}, which a graph of plain tensors cannot hold; {DOOR_2}")
    for name in itertools.chain(model._parameters, model._buffers, model._modules):
        if name in _GRAPHS_OWN:
            raise CaptureError(f"the model's {name} has a name that captured graphs use themselves; rename it, or {DOOR_2}")
    for path, part in model.named_modules():
        if path and (part._backward_hooks or part._backward_pre_hooks):
            raise CaptureError(f"{path} has a backward hook, which an exported graph does not keep; take it off")
    inputs = tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))
    with capturing_functions() as put_functions:
        exported, assigned = export(model, args, kwargs)
        module, constant_outputs = _flat_module(exported, flat)
        try:
            with patches.without_backward():
                joint = _torch.joint_graph(module, inputs, DECOMPOSITIONS)
        except RuntimeError as error:
            raise CaptureError(f"AOTAutograd could not trace the exported model: {error}; {DOOR_2}") from error
        put_functions(joint.graph)
    spec = exported.module_call_graph[0].signature.out_spec
    captured = _forward_half(joint, module, model, flat, in_spec, spec, constant_outputs)
    for node, source in zip(captured.graph.find_nodes(op="placeholder"), captured.sources, strict=True):
        if source.kind == "buffer" and source.name in assigned:
            _free(captured.graph, node)
    return captured


def _flat_module(exported: torch.export.ExportedProgram, flat: list[Any]) -> tuple[fx.GraphModule, dict[int, Any]]:
    """The exported program as a plain module from flat tensors to a flat tuple of tensors."""
    module = exported.module(check_guards=False)
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(flat), "export renumbered the inputs"
    for node in list(graph.nodes):
        if any(name in str(node.target) for name in _DROPPED) and not node.users:
            graph.erase_node(node)
    for node, leaf in zip(placeholders, flat, strict=True):
        if not isinstance(leaf, torch.Tensor):
            assert not node.users, "export kept a constant as an input"
            graph.erase_node(node)
    _cut_off_without_grad(graph)
    _refuse_stacked_dropout(graph)
    output = graph.output_node()
    leaves = pytree.tree_leaves(output.args[0])
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, fx.Node)}
    output.args = (tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node)),)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, graph), constants


def _refuse_stacked_dropout(graph: fx.Graph) -> None:
    """`nn.LSTM`, `nn.GRU` and `nn.RNN` lose the dropout between their layers when torch decomposes them."""
    for node in graph.nodes:
        if not isinstance(node.target, _torch.OpOverload):
            continue
        layers, dropout, trains = (argument(node, name) for name in ("num_layers", "dropout", "train"))
        if layers is not None and layers > 1 and dropout and trains:
            raise CaptureError(f"{node.target} loses the dropout between its layers in a graph; {DOOR_2}")


def _cut_off_without_grad(graph: fx.Graph) -> None:
    """Detach what sub-graphs without grad read. The flat graph runs with grad on throughout; autograd is to keep nothing of
    theirs."""
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled" or node.args[0]:
            continue
        for source in [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]:
            with graph.inserting_before(node):
                cut = graph.call_function(torch.ops.aten.detach.default, (source,))
            node.replace_input_with(source, cut)


def _forward_half(
    joint: fx.GraphModule,
    module: fx.GraphModule,
    model: nn.Module,
    flat: list[Any],
    in_spec: pytree.TreeSpec,
    out_spec: pytree.TreeSpec,
    constant_outputs: dict[int, Any],
) -> Captured:
    positions = [i for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
    graph = fx.Graph()
    sources: list[Source] = []
    constants: dict[str, torch.Tensor] = {}
    attributes: dict[str, Any] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    copied: dict[fx.Node, fx.Node] = {}
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            source = _source(node.meta["desc"], positions)
            if source is None:
                continue
            if source.kind == "buffer" and source.name not in buffers:
                tensor = attribute(module, source.name)
                source = _unregistered(source.name, tensor, model)
                if source.kind == "attribute":
                    attributes[source.name] = tensor_key(tensor)
                else:
                    constants[source.name] = tensor
            copied[node] = graph.node_copy(node)
            sources.append(source)
        elif node.op != "output" and all(n in copied for n in node.all_input_nodes):
            if node.op == "get_attr":
                constants[node.target] = attribute(joint, node.target)
                if isinstance(constants[node.target], torch.Generator):
                    raise CaptureError(f"the model draws from a generator of its own, of which no state is kept; {DOOR_2}")
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            if node.target is _BATCH_NORM:
                _free_running_statistics(copied[node])
    kept: list[fx.Node] = []
    mutations: list[tuple[int, Source]] = []
    by_index: dict[int, int] = {}
    outputs = joint.graph.output_node()
    for node, desc in zip(results(joint.graph), outputs.meta["desc"], strict=True):
        if isinstance(desc, _torch.GradAOTOutput):
            continue
        if isinstance(desc, _torch.InputMutationAOTOutput):
            source = _source(desc.mutated_input, positions)
            assert source is not None
            if source not in sources:
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
    graph.output(tuple(kept))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _refuse_other_results(graph)
    trains = [tensor_of(source, model, flat, constants).requires_grad for source in sources]
    for node in detach_without_gradient(graph, set(itertools.compress(graph.find_nodes(op="placeholder"), trains))):
        if node.target in _WRONG_AGAIN:
            raise CaptureError(f"{node.target} has another derivative in a graph than in the model; {DOOR_2}")
    tensors = itertools.count()
    flat_outputs = tuple(
        (-1, constant_outputs[i]) if i in constant_outputs else (by_index[next(tensors)], None)
        for i in range(out_spec.num_leaves)
    )
    held = _held_by_functions(graph, model)
    return Captured(graph, tuple(sources), in_spec, out_spec, flat_outputs, tuple(mutations), constants, attributes, held)


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


def _free(graph: fx.Graph, buffer: fx.Node) -> None:
    """Let a graph read a copy of a buffer: autograd may save it, and the step, which gives the model another, writes to it."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        copy = graph.call_function(torch.ops.aten.clone.default, (buffer,))
    copy.meta.update(buffer.meta)
    buffer.replace_all_uses_with(copy, lambda user: user is not copy)


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


def tensor_of(source: Source, model: nn.Module, flat: list[Any], constants: dict[str, torch.Tensor]) -> Any:
    """The tensor of a call with these leaves that a placeholder stands for."""
    if source.kind == "input":
        return flat[source.index]
    return constants[source.name] if source.kind == "constant" else attribute(model, source.name)


def attribute(module: nn.Module, target: str) -> Any:
    """What is at a path of names; None if nothing is."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
