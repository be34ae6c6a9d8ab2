"""A model's step block by block: each block is captured on its own, and what runs between them stays the user's code.

For models that one graph cannot hold, and for `fully_shard`, which needs each block to stay a module. The whole forward runs
once on fake tensors to see how blocks are called, and once more with the captured blocks in their places, watched by the
recorder. So one plan covers the step, and memory between blocks is in it; decisions are made inside of blocks only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from remat import _torch
from remat._torch import pytree
from remat.absent import LIBRARY_BYTES
from remat.capture import Captured, capture, without_cache
from remat.devices import profile_of
from remat.errors import CaptureError, RematError
from remat.op_times import op_times
from remat.passes.pinning import why_pinned
from remat.passes.regions import RegionGraph, form_regions
from remat.plan import Plan
from remat.program import HELD, Program
from remat.record import backward_from, mutated_inputs, write_program
from remat.recorder import Recorder, fake_like
from remat.resident import resident_memory
from remat.settings import Settings
from remat.sharding import ShardedStep, local_parameters
from remat.traced import Traced
from remat.twin import Twin, without_hooks
from remat.whole import inputs_of, placeholder_tensors, training
from remat.workspace import library_bytes

_CROSSES = "goes in or out of a block"


@dataclass
class BlockCall:
    """One call of a block in a forward of the model: `args` and `kwargs` are fake. `captured` is None where nothing in it
    requires grad, so that the block runs as it is."""

    path: str
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    captured: Captured | None = None


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
    if settings.host_budget is not None:
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


def trace_blocks(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: Mapping[str, nn.Module], settings: Settings
) -> TracedBlocks:
    """Capture each block of one call of `model`, and record the whole step. Allocates nothing on the device."""
    groups = _torch.sharded_groups(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole = any(tensor is p.shard and not p.is_split for g in groups for p in g.parameters)
        if _torch.is_traceable_wrapper_subclass(tensor) and not whole:
            raise CaptureError(
                f"{name} is a {type(tensor).__name__}, which a graph of plain tensors cannot hold; "
                'torch.compile(model, backend="remat", options={"budget": ...}) handles this'
            )
    inside = {id(module): path for path, block in blocks.items() for module in block.modules() if module is not block}
    for group in groups:
        if id(group.module) in inside:
            raise RematError(
                f"a module inside of the block {inside[id(group.module)]} is sharded on its own; shard the block, or make that "
                "module one with blocks=[...]"
            )
    calls = _observed(model, args, kwargs, blocks, groups)
    for index, call in enumerate(calls):
        if _trains(call.block, call.args, call.kwargs):
            call.captured = _captured(call, index)
    if all(call.captured is None for call in calls):
        raise RematError("nothing in the blocks requires grad, so there is nothing to plan there; unfreeze something first")
    recording = _Recording(model, blocks, groups, calls, settings.in_flight > 1)
    program = recording.program(model, args, kwargs, settings)
    graphs = [call.captured.graph for call in calls if call.captured is not None]
    text = "\n".join(f"{n.name} {n.target} {n.args} {getattr(n.meta.get('val'), 'shape', '')}" for g in graphs for n in g.nodes)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    nodes = tuple(ran.node for ran in recording.recorder.ran)
    about = type(model).__name__, inputs_of(args, kwargs), tuple(calls)
    return TracedBlocks(program, nodes, recording.place, recording.profile, fingerprint, frozenset(recording.trains), *about)


def _observed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Mapping[str, nn.Module],
    groups: Sequence[_torch.ShardedGroup],
) -> list[BlockCall]:
    """How a forward of the model calls its blocks, in order."""
    twin = Twin(model, groups)
    calls: list[BlockCall] = []

    def observe(path: str, *args: Any, **kwargs: Any) -> Any:
        block = twin.of(blocks[path])
        seen = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))
        calls.append(BlockCall(path, without_hooks(block), *seen))
        return type(block).forward(block, *args, **kwargs)

    ShardedStep(twin, groups)
    with twin.running():
        _run(model, twin, *twin.inputs(args, kwargs), blocks, observe)
    return calls


def _run(
    model: nn.Module,
    twin: Twin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blocks: Mapping[str, nn.Module],
    forward: Callable[..., Any],
) -> Any:
    """One forward of the twin, whose blocks call `forward(path, ...)`."""
    for path, block in blocks.items():
        twin.of(block).__dict__["forward"] = partial(forward, path)
    try:
        with without_cache(model):
            return twin.module(*args, **kwargs)
    except _torch.DataDependentOutputException as error:
        raise CaptureError(
            f"{type(model).__name__} reads the value of a tensor between its blocks ({error.func}); planning runs it without "
            "values"
        ) from error


def _trains(block: nn.Module, *inputs: Any) -> bool:
    return any(t.requires_grad for t in (*block.parameters(), *_tensors(inputs)))


def _captured(call: BlockCall, index: int) -> Captured:
    """The block's graph, whose nodes no other call's are named like, and whose modules have their whole paths."""
    captured = capture(call.block, call.args, call.kwargs, call.path)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in captured.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
        name = f"{call.path.replace('.', '_')}_{index}_{node.name}"
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=name)
        stack = node.meta.get("nn_module_stack") or {}
        paths = {key: (f"{call.path}.{path}" if path else call.path, kind) for key, (path, kind) in stack.items()}
        copies[node].meta = {**node.meta, "nn_module_stack": paths or {"": (call.path, None)}}
    return dataclasses.replace(captured, graph=graph)


class _Recording:
    """One step of the model's twin, with the captured blocks in their places."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        groups: Sequence[_torch.ShardedGroup],
        calls: Sequence[BlockCall],
        adds: bool,
    ) -> None:
        self.blocks, self.groups = blocks, groups
        self.parameters = local_parameters(model, groups)
        self.place = next((p.device for p in self.parameters if p.requires_grad), torch.device("cpu"))
        self.profile = profile_of(self.place)
        self.recorder = Recorder(self.profile)
        self.twin = Twin(model, groups, adds)
        self.pins: dict[int, str] = {}
        self.parts: list[tuple[int, int]] = []
        self.trains: set[int] = set()
        self.constants = [t for call in calls if call.captured is not None for t in call.captured.constants.values()]
        self._coming = iter(calls)
        for tensor in self.twin.tensors():
            self.recorder.know(tensor)
        inside = {id(module) for block in blocks.values() for module in block.modules()}
        for path, module in model.named_modules():
            if id(module) not in inside:
                self._name(self.twin.of(module), path)

    def program(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings) -> Program:
        """The step as numbers, under the hooks of `fully_shard` where there are any."""
        recorder, twin = self.recorder, self.twin
        sharded = ShardedStep(twin, self.groups, recorder)
        args_, kwargs_ = twin.inputs(args, kwargs)
        for tensor in _tensors(args_, kwargs_):
            recorder.know(tensor)
        with twin.running(), recorder.forward():
            output = _run(model, twin, args_, kwargs_, self.blocks, self._run_block)
        sharded.end_forward()
        leaves = _tensors(output)
        self.pins.update(dict.fromkeys((id(s) for s in recorder.behind(leaves) if id(s) in self.pins), HELD))
        with twin.mode, recorder.backward():
            backward_from(leaves)
            sharded.end_backward()
        given = [*_tensors(args, kwargs), *self.constants]
        libraries = library_bytes(self.place) if self.profile.is_here else LIBRARY_BYTES if self.profile.is_gpu else 0
        resident = resident_memory(given, self.parameters, list(model.buffers()), settings.optimizer, settings.in_flight > 1)
        times = op_times(self.place) if settings.costs == "measured" else None
        found = write_program(recorder, self.pins, {**resident, "libraries": libraries}, times, tuple(self.parts))
        if times is not None:
            times.save()
        return found

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

    def _run_block(self, path: str, *args: Any, **kwargs: Any) -> Any:
        block, captured = self.twin.of(self.blocks[path]), next(self._coming).captured
        if captured is None:
            return type(block).forward(block, *args, **kwargs)
        recorder, start = self.recorder, len(self.recorder.ran)
        tensors = placeholder_tensors(captured, block, args, kwargs)
        for i, source in enumerate(captured.sources):
            if source.kind == "constant":
                tensors[i] = fake_like(tensors[i])
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
