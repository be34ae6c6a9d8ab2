"""From a module and example inputs to one functional forward graph.

`torch.export(strict=False)` sees through any Python the model is written in; AOTAutograd then turns the exported program
into ops that each have a derivative formula of their own, without mutation. The forward half of that joint graph is what
door 1 plans on and runs: node for node what autograd sees. What export would drop in silence (a model's own checkpoints,
custom autograd functions) is refused here.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from remat import _torch
from remat._torch import pytree
from remat.errors import CaptureError
from remat.passes.aliasing import results
from remat.passes.randomness import argument
from remat.twin import Twin

log = logging.getLogger("remat")

_BLOCKWISE = "; or block by block: remat.enable(model, budget, whole_model=False)"
DOOR_2 = 'torch.compile(model, backend="remat", options={"budget": ...}) handles this'
_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_WRONG_AGAIN = (torch.ops.aten.rrelu_with_noise_functional.default,)  # its derivative takes the noise from before the draw
_DROPPED = ("_assert_tensor_metadata", "_assert_scalar", "_guards_fn", "sym_constrain_range", "_assert_async")
_SWAPPED = r"The tensor attributes? ((\S+\.)?_flat_weights\[\d+\](, )?)+ w"  # of an RNN, while export swaps its parameters


@dataclass(frozen=True)
class Source:
    """Where a placeholder's tensor comes from: a parameter, buffer or lifted constant by name, or flat input `index`."""

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
    """

    graph: fx.Graph
    sources: tuple[Source, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    outputs: tuple[tuple[int, Any], ...]
    mutations: tuple[tuple[int, Source], ...]
    constants: dict[str, torch.Tensor]

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


@_torch.native_upsampling()
def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    kwargs = dict(sorted(kwargs.items()))
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.numel()}
    if len(devices) > 1:
        raise CaptureError(f"the model is on several devices ({', '.join(sorted(map(str, devices)))}); remat plans for one")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if _torch.is_traceable_wrapper_subclass(tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__}, which a graph of plain tensors cannot hold; {DOOR_2}")
    exported = _export(model, args, kwargs)
    module, constant_outputs = _flat_module(exported, flat)
    inputs = tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))
    try:
        joint = _torch.joint_graph(module, inputs)
    except RuntimeError as error:
        raise CaptureError(f"AOTAutograd could not trace the exported model: {error}; {DOOR_2}") from error
    own = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
    return _forward_half(joint, module, own, flat, in_spec, exported.module_call_graph[0].signature.out_spec, constant_outputs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """The model as it runs eagerly; where that cannot be exported, as its libraries would have it exported."""
    own = _torch.fake_modes((*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))))
    errors: list[Exception] = []
    for way in (_torch.specializing(_single_sequences(model, args, kwargs)), contextlib.nullcontext()):
        try:
            with _torch.watch_for_opaque_autograd(), way, without_cache(model), warnings.catch_warnings():
                warnings.filterwarnings("ignore", _SWAPPED)
                exported = torch.export.export(model, args, kwargs, strict=False)
            if _torch.fake_modes(exported.constants.values()) - own:  # export does not look where inputs are fake
                raise CaptureError("an intermediate result became a constant")
            return exported
        except Exception as error:  # export raises many types, none of them documented
            cause = _find(error, _torch.OpaqueAutograd)
            if cause is not None:
                raise CaptureError(_opaque_message(cause.what)) from error
            log.debug("%s: cannot be exported as it is: %s", type(model).__name__, error)
            errors.append(error)
    reason = str(errors[0]).strip().splitlines()[0] if str(errors[0]).strip() else type(errors[0]).__name__
    raise CaptureError(f"{reason}\n  at {_user_line(errors[0])}\n  One graph cannot hold this; {DOOR_2}") from errors[0]


def _single_sequences(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool]:
    """For each time that transformers looks whether a row's positions are of several sequences, True where they follow from no
    input, and are of one. Found in a run on fake tensors; what that does not reach counts as False."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    looked = getattr(masks, "find_packed_sequence_indices", None)
    found: list[bool] = []
    if looked is None or not any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        return found

    def look(position_ids: torch.Tensor) -> torch.Tensor | None:
        packed: torch.Tensor | None = looked(position_ids)
        found.append(packed is None)
        return packed

    twin = Twin(model)
    args, kwargs = pytree.tree_map_only(torch.Tensor, twin.like, (args, kwargs))
    masks.find_packed_sequence_indices = look
    try:
        with torch.no_grad(), twin.running(), without_cache(model):
            twin.module(*args, **kwargs)
    except Exception as error:  # of any kind: a model may do what fake tensors cannot
        log.debug("%s: looks at positions are known up to an error: %s", type(model).__name__, error)
    finally:
        masks.find_packed_sequence_indices = looked
    return found


@contextlib.contextmanager
def without_outer_hooks() -> Iterator[None]:
    """Keep what tracing saves from saved-tensor hooks around the call: from `torch.utils.checkpoint`, which counts it, and from
    `save_on_cpu`."""
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Leave a generation cache (transformers: `config.use_cache`) out of the training step: nothing there reads it."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs: dict[int, Any] = {id(c): c for c in found if getattr(c, "use_cache", None) is True}
    if configs:
        log.info("%s: the key-value cache is left out of training steps", type(model).__name__)
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _opaque_message(what: str) -> str:
    if what == "torch.utils.checkpoint":
        return (
            "the model already checkpoints itself with torch.utils.checkpoint, which remat replaces; turn it off first "
            "(transformers: model.activation_checkpointing_disable(), gradient_checkpointing_disable() before 5.23)"
        )
    return f"the model calls the custom autograd function {what}, whose backward an exported graph does not keep; {DOOR_2}"


def _find(error: BaseException | None, kind: type[_torch.OpaqueAutograd]) -> _torch.OpaqueAutograd | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def _user_line(error: BaseException) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and "/remat/" not in f.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"


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
    _inline_grad_modes(module)
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
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        layers, dropout, trains = (argument(node, name) for name in ("num_layers", "dropout", "train"))
        if layers is not None and layers > 1 and dropout and trains:
            raise CaptureError(f"{node.target} loses the dropout between its layers in a graph; {DOOR_2}")


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """Detach what comes out of a no-grad sub-graph: the flat graph runs with grad on throughout."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            continue
        if node.args[0]:
            continue
        with module.graph.inserting_after(node):
            for user in list(node.users):
                with module.graph.inserting_after(user):
                    cut = module.graph.call_function(torch.ops.aten.detach.default, (user,))
                user.replace_all_uses_with(cut, delete_user_cb=lambda other, cut=cut: other is not cut)


def _forward_half(
    joint: fx.GraphModule,
    module: fx.GraphModule,
    own: frozenset[str],
    flat: list[Any],
    in_spec: pytree.TreeSpec,
    out_spec: pytree.TreeSpec,
    constant_outputs: dict[int, Any],
) -> Captured:
    positions = [i for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
    graph = fx.Graph()
    sources: list[Source] = []
    constants: dict[str, torch.Tensor] = {}
    copied: dict[fx.Node, fx.Node] = {}
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            source = _source(node.meta["desc"], positions)
            if source is None:
                continue
            if source.kind == "buffer" and source.name not in own:
                constant = _attribute(module, source.name)
                source = Source("constant", source.name.replace(".", "_"))  # no submodule of the original has it
                constants[source.name] = constant
            copied[node] = graph.node_copy(node)
            sources.append(source)
        elif node.op != "output" and all(n in copied for n in node.all_input_nodes):
            if node.target in _WRONG_AGAIN:
                raise CaptureError(f"{node.target} has another derivative in a graph than in the model; {DOOR_2}")
            if node.op == "get_attr":
                constants[node.target] = _attribute(joint, node.target)
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
            mutations.append((len(kept), source))
        elif isinstance(desc, _torch.PlainAOTOutput):
            by_index[desc.idx] = len(kept)
        else:
            continue
        kept.append(copied[node])
    graph.output(tuple(kept))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(constants[node.target], nn.Module):
            (user, *_) = node.users
            raise CaptureError(f"{user.target} runs a graph of its own, which is planned for in compiled steps; {DOOR_2}")
    tensors = itertools.count()
    flat_outputs = tuple(
        (-1, constant_outputs[i]) if i in constant_outputs else (by_index[next(tensors)], None)
        for i in range(out_spec.num_leaves)
    )
    return Captured(graph, tuple(sources), in_spec, out_spec, flat_outputs, tuple(mutations), constants)


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
    if isinstance(desc, _torch.ForwardTokenAOTInput):
        raise CaptureError(f"the model calls an op with effects, such as the checks of torch.linalg's solvers; {DOOR_2}")
    raise CaptureError(f"remat does not know how to feed {desc!r} to the captured graph; {DOOR_2}")


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
