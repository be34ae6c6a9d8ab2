"""From a module and example inputs to one functional forward graph.

`torch.export(strict=False)` sees through any Python the model is written in; AOTAutograd then turns the exported program
into ops that each have a derivative formula of their own, without mutation. The forward half of that joint graph is what
door 1 plans on and runs: node for node what autograd sees. What export would drop in silence (a model's own checkpoints)
is refused here; autograd functions are put back (`remat.function_capture`).
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import fx, nn

from remat import _torch, patches
from remat._torch import pytree
from remat.captured import Captured
from remat.differentiable import DECOMPOSITIONS
from remat.errors import CaptureError, RematError, reason_of
from remat.export import DOOR_2, export
from remat.forward_half import forward_half
from remat.function_capture import capturing_functions
from remat.passes.embeddings import check_embeddings
from remat.passes.randomness import argument

_BLOCKWISE = "; or block by block: remat.enable(model, budget, whole_model=False), or a part: remat.enable(model.part, budget)"
_GRAPHS_OWN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
_DROPPED = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn", "sym_constrain_range", "_assert_async")


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: str = "") -> Captured:
    """Capture one training forward of `model`, or of the block of one that is at the path `block`. Raises CaptureError with the
    place and the way out."""
    way_out = ""
    try:
        _refuse_anywhere(model, args, kwargs)
        way_out = _BLOCKWISE
        captured = _captured(model, args, kwargs)
    except CaptureError as error:
        error.args = (f"block {block}: {error}" if block else f"{error}{way_out}",)
        raise
    check_embeddings(captured.graph)
    return captured


def check_model(model: Any, args: Any, kwargs: Any = None) -> None:
    """Raises RematError for what cannot be a model, or its inputs, or has been rewritten in place already."""
    if not isinstance(model, nn.Module):
        raise RematError(f"a {type(model).__name__} is no nn.Module; write one whose forward calls it")
    check_inputs(args, kwargs)
    lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise RematError(f"{lazy} has no shape yet, which lazy modules find in their first call; call the model once before")
    enabled = next((module for module in model.modules() if "_remat" in vars(module)), None)
    if enabled is not None:
        raise RematError(f"remat is enabled for {type(enabled).__name__} already; call remat.disable on it first")
    rewritten = next((path for path, module in model.named_modules() if path and "_original" in vars(module)), None)
    if rewritten is not None:
        raise RematError(f"{rewritten} comes from remat.optimize and has a plan already; put the original there")


def check_inputs(args: Any, kwargs: Any) -> None:
    """Raises RematError for what cannot be the inputs of a call."""
    if not isinstance(args, tuple):
        raise RematError(f"args is a {type(args).__name__}; give a tuple of positional inputs, args=(x,)")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RematError(f"kwargs is a {type(kwargs).__name__}; give a dictionary of inputs by name")


def check_parameters(model: nn.Module) -> None:
    """Raises CaptureError where plain tensors stand for parameters."""
    replaced = next((name for name, p in model.named_parameters() if not isinstance(p, nn.Parameter)), None)
    if replaced is not None:
        raise CaptureError(
            f"{replaced} is no nn.Parameter in this call, as within torch.func.functional_call; call the model itself once "
            f"before, or {DOOR_2}"
        )


def _refuse_anywhere(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises CaptureError for what no graph can hold, of a whole model or of a block."""
    check_parameters(model)
    given = (("an input", leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers(), given):
        if tensor.layout is not torch.strided:
            raise CaptureError(f"{name} is a tensor of layout {tensor.layout}, for which there is no plan; {DOOR_2}")
        if _torch.is_traceable_wrapper_subclass(tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__}, which a graph of plain tensors cannot hold; {DOOR_2}")


@_torch.tracing_alone()
@patches.native_kernels()
def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    kwargs = dict(sorted(kwargs.items()))
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    for name in itertools.chain(model._parameters, model._buffers, model._modules):
        if name in _GRAPHS_OWN or re.fullmatch(r"region_\d+", name):
            raise CaptureError(f"the model's {name} has a name that captured graphs use themselves; rename it, or {DOOR_2}")
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.numel()}
    if len(devices) > 1:
        raise CaptureError(f"the model is on several devices ({', '.join(sorted(map(str, devices)))}); remat plans for one")
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
            raise CaptureError(f"AOTAutograd could not trace the exported model: {reason_of(error)}; {DOOR_2}") from error
        put_functions(joint.graph)
    spec = exported.module_call_graph[0].signature.out_spec
    captured = forward_half(joint, module, model, flat, (in_spec, spec), constant_outputs)
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
    _leave_out_checks(module)
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


def _leave_out_checks(module: fx.GraphModule) -> None:
    """Erase the checks of a graph and of those within it (without grad, in autocast), and the numbers that only they read."""
    for part in [part for part in module.modules() if isinstance(part, fx.GraphModule)]:
        for node in reversed(list(part.graph.nodes)):
            is_check = any(name in str(node.target) for name in _DROPPED)
            is_number = node.op == "call_function" and isinstance(node.meta.get("val"), _NUMBERS)
            if (is_check or is_number) and not node.users:
                part.graph.erase_node(node)
        part.recompile()


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


def _free(graph: fx.Graph, buffer: fx.Node) -> None:
    """Let a graph read a copy of a buffer: autograd may save it, and the step, which gives the model another, writes to it."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        copy = graph.call_function(torch.ops.aten.clone.default, (buffer,))
    copy.meta.update(buffer.meta)
    buffer.replace_all_uses_with(copy, lambda user: user is not copy)
