"""Everything private of torch that remat uses, in one place. A new torch release touches this file only."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._C._autograd import DeviceType, _profiler_enabled
from torch._dynamo.exc import ShortenTraceback
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors, aot_module_simplified
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch._guards import CompileContext
from torch._inductor import config as inductor_config
from torch._inductor import memory as inductor_memory
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

__all__ = [
    "BufferAOTInput",
    "DataDependentOutputException",
    "FakeTensorMode",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "ParamAOTInput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "TangentAOTInput",
    "TorchDispatchMode",
    "aot_eager",
    "compile_options",
    "compile_with_inductor",
    "extract_forward_backward",
    "flop_registry",
    "frame_id",
    "has_graph_break",
    "in_functorch",
    "joint_graph",
    "memory_events",
    "no_dispatch_modes",
    "outermost_module",
    "past_dynamo",
    "profiler_is_running",
    "pytree",
    "scheduled_peak_bytes",
    "specializing",
    "storage_key",
    "watch_for_opaque_autograd",
]


_FUSION_REACH = 10  # kernels


def storage_key(tensor: torch.Tensor) -> int:
    """What tells two live storages apart, on every device, fake tensors included."""
    return tensor.untyped_storage()._cdata


def memory_events(profile: torch.profiler.profile) -> Iterator[tuple[int, int]]:
    """(time in ns, bytes) of each CPU allocation (positive) that a profile saw and of its release (negative), in order.

    Releases of what was allocated before the profile are in it only if an earlier profile saw the allocation.
    """
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    return ((event.start_ns(), event.nbytes()) for event in sorted(found, key=lambda event: event.start_ns()))  # type: ignore[union-attr]


def joint_graph(module: fx.GraphModule, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """AOTAutograd's joint graph of a module with flat inputs; placeholders and outputs carry `meta["desc"]`."""
    with contextlib.ExitStack() as stack:
        return aot_export_joint_with_descriptors(stack, module, inputs, decompositions={}).graph_module


def extract_forward_backward(
    joint: fx.GraphModule, saved: list[fx.Node], num_fwd_outputs: int, static_inputs: Sequence[int] | None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """AOTAutograd's own split of a joint graph at the given saved values."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    static = OrderedSet(placeholders[i] for i in static_inputs or ())
    symbols = [node for node in saved if not isinstance(node.meta.get("val"), torch.Tensor)]
    tensors = [node for node in saved if isinstance(node.meta.get("val"), torch.Tensor)]
    return _extract_fwd_bwd_modules(
        joint, tensors, symbols, num_fwd_outputs=num_fwd_outputs, static_lifetime_input_nodes=static
    )


class _Partitioner(CustomPartitionerFn):
    """A partition function in the form that Inductor's configuration takes."""

    def __init__(self, split: Callable[..., Any], uuid: str) -> None:
        self.split, self._uuid = split, uuid

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return self.split(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        return self._uuid

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partitioner:
        return self  # Inductor copies its whole configuration now and then


class LocalFusion(InductorChoices):
    """Inductor's fusion choices, without horizontal fusion of kernels that are far apart in running order.

    Such fusions share a read of some small table and pull the recompute of many layers to one moment, where all of it is
    held (`Scheduler.are_long_distant_nodes` says as much of its own threshold, which is more than a layer).
    """

    def uuid(self) -> str:
        return f"remat.LocalFusion.{_FUSION_REACH}"

    @staticmethod
    def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        distance = max(abs(node1.min_order - node2.max_order), abs(node2.min_order - node1.max_order))
        if distance > _FUSION_REACH:
            return False
        return InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)


class _Probed(Exception):
    """Ends a trial compilation once its schedule is known."""


def scheduled_peak_bytes(module: fx.GraphModule, is_backward: bool) -> int:
    """Peak bytes of a graph as Inductor schedules it: freeable inputs, intermediates and outputs, without parameters.

    Lowers, fuses and orders a copy of the graph as the real compilation will, and stops before any code is generated.
    """
    found: list[int] = []

    def probe(nodes: list[Any]) -> list[Any]:
        scheduler, graph = V.graph.scheduler, V.graph
        inputs, outputs = OrderedSet(graph.graph_inputs.keys()), OrderedSet(graph.get_output_names())
        args = (scheduler.name_to_buf, scheduler.name_to_fused_node, inputs, outputs)
        nodes = inductor_memory.reorder_for_peak_memory(nodes, *args)
        found.append(inductor_memory.prepare_planning_info(nodes, *args)[0])
        raise _Probed

    twin = copy.deepcopy(module)
    inputs = [node.meta["val"] for node in twin.graph.find_nodes(op="placeholder")]
    patches = {"_post_fusion_custom_pass": probe, "inductor_choices_class": LocalFusion, "fx_graph_cache": False}
    try:
        with inductor_config.patch(patches):
            compile_fx_inner(twin, inputs, is_backward=is_backward, cudagraphs=BoxedBool(False), graph_id=0)
    except Exception as error:  # the probe's own, wrapped by whatever Inductor wraps it in
        if not found:
            raise error
    return found[0]


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], split: Callable[..., Any], uuid: str
) -> Callable[..., Any]:
    """Inductor with our partition. AOTAutograd's own cache is off: it would skip the partition, and with it the plan."""
    with functorch_config.patch(enable_autograd_cache=False):
        patches = {"custom_partitioner_fn": _Partitioner(split, uuid), "inductor_choices_class": LocalFusion}
        return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value]


def aot_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: Callable[..., Any], split: Callable[..., Any]
) -> Callable[..., Any]:
    """AOTAutograd with our partition, the halves run by `compiler`."""
    return aot_module_simplified(gm, inputs, fw_compiler=compiler, bw_compiler=compiler, partition_fn=split)


def outermost_module() -> torch.nn.Module | None:
    """The module whose call led to this compilation: the outermost on the Python stack, None outside of any."""
    frame, found = sys._getframe(), None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and not isinstance(owner, fx.GraphModule):
            found = owner
        frame = frame.f_back  # type: ignore[assignment]
    return found


def past_dynamo(error: Exception) -> Exception:
    """The same error in a form that Dynamo raises as it is, instead of as BackendCompilerFailed."""
    kind = type(error)
    passing = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    twin: Exception = passing.__new__(passing, *error.args)
    twin.args = error.args
    twin.__dict__.update(error.__dict__, first_useful_frame=None)
    return twin


def has_graph_break(gm: fx.GraphModule) -> bool:
    """True if Dynamo cut the model after this graph, so that more graphs follow."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(reason is not None and reason.graph_break)


def frame_id() -> int:
    """The number of the Dynamo frame being compiled; frames of one step are numbered in running order."""
    compile_id = CompileContext.current_compile_id()
    return int(compile_id.frame_id) if compile_id is not None and compile_id.frame_id is not None else 0


def compile_options(compiled: Any) -> tuple[Any] | None:
    """The options object a module or function was compiled with, as a 1-tuple; None if its backend is not remat."""
    for wrapper in (compiled, getattr(compiled, "_compiled_call_impl", None)):
        context = getattr(wrapper, "dynamo_ctx", None)
        if context is None:
            cells = inspect.getclosurevars(wrapper).nonlocals if inspect.isfunction(wrapper) else {}
            context = cells.get("self")
        backend = getattr(context, "callback", None)
        while backend is not None and not hasattr(backend, "compiler_name"):
            backend = getattr(backend, "_torchdynamo_orig_backend", None)
        if backend is not None:
            break
    if backend is None or backend.compiler_name != "remat":
        return None
    return (backend.kwargs.get("options"),)


no_dispatch_modes = _disable_current_modes  # so that real tensors stay real while a compiler is tracing


def profiler_is_running() -> bool:
    """True inside any torch profiler; two cannot run at once."""
    return _profiler_enabled()


def in_functorch() -> bool:
    """True inside a torch.func transform, where saved-tensor hooks do not work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class OpaqueAutograd(Exception):
    """A model used what an exported graph would silently drop: `what` names it."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@contextlib.contextmanager
def specializing() -> Iterator[None]:
    """Let a model take its eager paths while it is exported.

    Libraries ask `torch.compiler.is_exporting()` to choose slower code that serves any input (transformers: explicit causal
    masks, repeated key and value heads). A captured graph here serves one kind of call and is never deployed.
    """
    asked = torch.compiler.is_exporting
    torch.compiler.is_exporting = lambda: False
    try:
        yield
    finally:
        torch.compiler.is_exporting = asked


@contextlib.contextmanager
def watch_for_opaque_autograd() -> Iterator[None]:
    """Raise OpaqueAutograd where a model checkpoints itself or calls its own autograd.Function.

    Non-strict export runs through both and keeps neither the checkpoint nor the custom backward.
    """
    from torch.utils import checkpoint

    generator, apply = checkpoint._checkpoint_without_reentrant_generator, torch.autograd.Function.__dict__["apply"]

    def no_checkpoint(*_: Any, **__: Any) -> Any:
        raise OpaqueAutograd("torch.utils.checkpoint")

    def no_function(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is checkpoint.CheckpointFunction:
            raise OpaqueAutograd("torch.utils.checkpoint")
        if not cls.__module__.startswith("torch."):
            raise OpaqueAutograd(f"{cls.__module__}.{cls.__qualname__}")
        return apply.__func__(cls, *args, **kwargs)

    checkpoint._checkpoint_without_reentrant_generator = no_checkpoint
    torch.autograd.Function.apply = classmethod(no_function)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = generator
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
