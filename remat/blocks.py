"""A model's step block by block: each block is captured on its own, and what runs between them stays the user's code.

For models that one graph cannot hold, and for `fully_shard`, which needs each block to stay a module. The whole forward runs
once on fake tensors, watched by the recorder; each block is captured when it is called, and its graph runs in its place. So
one plan covers the step, and memory between blocks is in it; decisions are made inside of blocks only.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from remat import _torch
from remat._torch import pytree
from remat.backward import loss_from, run_backward
from remat.capture import capture, check_parameters
from remat.captured import Captured
from remat.devices import profile_of
from remat.errors import CaptureError, RematError, reason_of
from remat.export import DOOR_2, as_in_training, say_without_cache, without_cache
from remat.kept import kept_as_before
from remat.passes.pinning import why_pinned
from remat.passes.regions import RegionGraph, form_regions
from remat.plan import Plan
from remat.program import HELD, RETURNED, Program
from remat.record import mutated_inputs, write_program
from remat.recorder import Recorder
from remat.resident import attributes_of
from remat.settings import Settings
from remat.sharding import ShardedStep, local_parameters
from remat.site import Site, site_of
from remat.state import flatten_call, leaves_key
from remat.traced import ModelCall, Traced, fingerprint_of
from remat.twin import Twin, without_hooks
from remat.whole import inputs_of, placeholder_tensors, training

_CROSSES = "goes in or out of a block"


@dataclass(frozen=True)
class BlockCall:
    """One call of a block in a forward of the model, with arguments as `way` says. `captured` is None where nothing in it
    requires grad, so that the block runs as it is."""

    path: str
    way: Any
    captured: Captured | None


@dataclass(frozen=True)
class TracedBlocks(Traced):
    """A step, and the calls of blocks in it, in order."""

    calls: tuple[BlockCall, ...]

    def rewritten(self, plan: Plan) -> Iterator[tuple[BlockCall, fx.Graph | None, tuple[RegionGraph, ...]]]:
        """Each call with the outer graph that the plan makes of it, None where it runs as it is, and its regions."""
        stretches = self.stretches(plan)
        for call in self.calls:
            if call.captured is None:
                yield call, None, ()
                continue
            names = {node.name for node in call.captured.graph.nodes}
            ours = [stretch for stretch in stretches if stretch.nodes[0] in names]
            yield call, *form_regions(call.captured.graph, ours)


def check_blockwise(settings: Settings) -> None:
    """Raises RematError for what cannot be done block by block."""
    if settings.policy in ("offload", "offload-all", "sqrt"):
        raise RematError(f"policy={settings.policy!r} reaches across blocks, which a model rewritten block by block cannot")
    if settings.host_budget:
        raise RematError("host_budget=: nothing moves to the host in a model rewritten block by block")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements with parameters of a model's outermost lists of modules (ModuleList, ModuleDict, Sequential), by path.

    Raises RematError where there are none.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str, listed: bool) -> None:
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        if listed and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            if next(module.parameters(), None) is not None:
                found[path] = module
            return
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, is_list)

    visit(model, "", False)
    if not found:
        raise RematError(
            f"{type(model).__name__} has no ModuleList, ModuleDict or Sequential whose elements could be blocks; name them: "
            "optimize_blocks(model, blocks=[...], budget=...)"
        )
    return found


@_torch.tracing_alone()
@as_in_training()
def trace_blocks(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: Mapping[str, nn.Module], settings: Settings
) -> TracedBlocks:
    """Capture each block of one call of `model`, and record the step. Allocates nothing on the device but masks, positions
    and constants, at whose values the code between blocks may look, and what kernels take that run for their scratch memory."""
    groups = _torch.sharded_groups(model)
    check_parameters(model)
    given = [("an input", leaf) for leaf in _tensors(args, kwargs)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *given):
        whole = any(tensor is p.shard and not p.is_split for g in groups for p in g.parameters)
        if tensor.layout is not torch.strided or (_torch.is_traceable_wrapper_subclass(tensor) and not whole):
            raise CaptureError(
                f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, which a graph of plain tensors cannot hold; "
                'torch.compile(model, backend="remat", options={"budget": ...}) handles this'
            )
    inside = {id(module): path for path, block in blocks.items() for module in block.modules() if module is not block}
    for group in groups:
        if id(group.module) in inside:
            raise RematError(
                f"a module inside of the block {inside[id(group.module)]} is sharded on its own; shard the block, or make that "
                "module one with blocks=[...]"
            )
    recording = _Recording(model, blocks, groups, settings.in_flight > 1)
    with kept_as_before(model, (args, kwargs), DOOR_2):
        program, site = recording.step(args, kwargs, settings)
    graphs = [call.captured.graph for call in recording.calls if call.captured is not None]
    if not graphs:
        raise RematError("nothing in the blocks requires grad, so there is nothing to plan there; unfreeze something first")
    fingerprint = fingerprint_of(graphs)
    nodes = tuple(ran.node for ran in recording.recorder.ran)
    step = program, nodes, site, fingerprint, frozenset(recording.trains)
    return TracedBlocks(
        *step, ModelCall(type(model).__name__, inputs_of(args, kwargs)), settings.in_flight, tuple(recording.calls)
    )


def _named(captured: Captured, path: str, index: int) -> Captured:
    """A block's graph, with names that no other call's nodes have, and whole paths of modules."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in captured.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
        name = f"{path.replace('.', '_')}_{index}_{node.name}"
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=name)
        stack = node.meta.get("nn_module_stack") or {}
        paths = {key: (f"{path}.{inner}" if inner else path, kind) for key, (inner, kind) in stack.items()}
        copies[node].meta = {**node.meta, "nn_module_stack": paths or {"": (path, None)}}
    return dataclasses.replace(captured, graph=graph)


class _Recording:
    """One step of the model's twin, in which each block is captured when it is called, and its graph run in its place."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        groups: Sequence[_torch.ShardedGroup],
        adds: bool,
    ) -> None:
        self.model, self.groups = model, groups
        self.thread = threading.get_ident()
        self.calls: list[BlockCall] = []
        self.parameters = local_parameters(model, groups)
        self.place = next((p.device for p in self.parameters if p.requires_grad), torch.device("cpu"))
        self.recorder = Recorder(profile_of(self.place))
        self.twin = Twin(model, groups, adds)
        self.attributes: list[torch.Tensor] = []
        self.pins: dict[int, str] = {}
        self.parts: list[tuple[int, int]] = []
        self.trains: set[int] = set()
        for tensor in self.twin.tensors():
            self.recorder.know(tensor)
        inside = {id(module) for block in blocks.values() for module in block.modules()}
        for path, module in model.named_modules():
            if id(module) not in inside:
                self._name(self.twin.of(module), path)
        for path, block in blocks.items():
            self.twin.of(block).__dict__["forward"] = partial(self._run_block, path, self.twin.of(block))

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings) -> tuple[Program, Site]:
        """The step as numbers, under the hooks of `fully_shard` where there are any, and where it runs."""
        recorder, twin = self.recorder, self.twin
        sharded = ShardedStep(twin, self.groups, recorder)
        args_, kwargs_ = twin.inputs(args, kwargs)
        for tensor in _tensors(args_, kwargs_):
            recorder.know(tensor)
        with twin.running(), recorder.forward():
            output = self._run(args_, kwargs_)
        sharded.end_forward()
        returned = [storage for storage in recorder.behind(output) if id(storage) in self.pins]
        self.pins.update(dict.fromkeys(map(id, returned), RETURNED))
        with twin.mode, recorder.backward():
            loss, held = loss_from(output, recorder, settings)
            holds_outputs = held is output
            del output
            self.pins.update(dict.fromkeys((id(s) for s in recorder.behind(held) if id(s) in self.pins), HELD))
            run_backward(loss, recorder)
            sharded.end_backward()
        graphs = [call.captured for call in self.calls if call.captured is not None]
        own = [t for graph in graphs for t in (*graph.constants.values(), *graph.read_by_functions())]
        given = [*_tensors(args, kwargs), *own, *self.attributes]
        others = [*(t for t in attributes_of(self.model) if t.device == self.place), *recorder.found]
        site = site_of(self.place, settings, given, self.parameters, list(self.model.buffers()), others)
        return write_program(recorder, self.pins, site, holds_outputs, tuple(self.parts)), site

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        say_without_cache(self.model)
        try:
            with without_cache(self.model):
                return self.twin.module(*args, **kwargs)
        except (_torch.DataDependentOutputException, _torch.DynamicOutputShapeException) as error:
            raise CaptureError(
                f"{type(self.model).__name__} reads the value of a tensor between its blocks ({error.func}); planning runs it "
                f"without values; enable the part of it with most of its memory, remat.enable(model.part, budget), or {DOOR_2}"
            ) from error
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what fake tensors cannot do, or the recorder's hooks prevent
            raise CaptureError(
                f"{type(self.model).__name__} fails between its blocks, where planning runs it without values: "
                f"{reason_of(error)}\n  If the model alone runs on this input, {DOOR_2}"
            ) from error

    def _name(self, module: nn.Module, path: str) -> None:
        """Let the recorder know in which module it is."""
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self.recorder.module)
            self.recorder.module = path

        def leave(*_: Any) -> None:
            self.recorder.module = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _captured(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured | None:
        if not any(t.requires_grad for t in (*block.parameters(), *_tensors(args, kwargs))):
            return None
        with _torch.no_dispatch_modes(), self.recorder.paused():
            like = partial(pytree.tree_map_only, torch.Tensor, lambda t: self.twin.like(t).requires_grad_(t.requires_grad))
            args, kwargs = like((args, kwargs))
            captured = capture(without_hooks(block), args, kwargs, path)
        return _named(captured, path, len(self.calls))

    def _run_block(self, path: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.recorder.in_forward:
            raise CaptureError(f"{path} runs in backward too, as where a model checkpoints itself; turn that off first")
        if not torch.is_grad_enabled():  # no call that the plan speaks of
            return type(block).forward(block, *args, **kwargs)
        if threading.get_ident() != self.thread:
            raise CaptureError(f"{path} runs on a thread that forward started, which planning does not follow")
        captured = self._captured(path, block, args, kwargs)
        self.calls.append(BlockCall(path, leaves_key(*flatten_call(args, kwargs)), captured))
        if captured is None:
            return type(block).forward(block, *args, **kwargs)
        recorder, start = self.recorder, len(self.recorder.ran)
        tensors = placeholder_tensors(captured, block, args, kwargs)
        for i, source in enumerate(captured.sources):
            if source.kind == "attribute":
                self.attributes.append(tensors[i])
            if source.kind in ("constant", "attribute"):
                with _torch.no_dispatch_modes(), recorder.paused():  # no op of the step
                    tensors[i] = self.twin.like(tensors[i]).requires_grad_(tensors[i].requires_grad)
                recorder.know(tensors[i])
        self._cross(args, kwargs)
        results = recorder.run_graph(captured, tensors)
        mutated = mutated_inputs(captured)
        for ran in recorder.ran[start:]:
            for storage in ran.storages:
                if storage.node is ran.node:
                    self.pins.setdefault(id(storage), why_pinned(ran.node, mutated))
        self._cross(results)
        self.parts.append((start, len(recorder.ran)))
        self.trains.update(start + p for p in training(captured, tensors))
        return captured.output_of(results)

    def _cross(self, *values: Any) -> None:
        """What goes in or out of a block can only be saved."""
        for tensor in _tensors(values):
            for storage in self.recorder.behind(tensor):
                self.pins[id(storage)] = _CROSSES
                if storage.node is not None and "val" not in storage.node.meta:
                    storage.node.meta["val"] = _torch.meta_like(tensor)


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
