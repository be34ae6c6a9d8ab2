"""Everything private of torch that remat uses, in one place. A new torch release touches this file, and `remat.patches`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx
from torch._C._autograd import DeviceType, _get_sequence_nr, _profiler_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.utils import preserve_rng_state
from torch._export.passes import replace_set_grad_with_hop_pass as export_grad_modes
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    ForwardTokenAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
    ViewBaseAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors, aot_module_simplified
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch._guards import CompileContext, TracingContext, tracing
from torch._higher_order_ops import invoke_subgraph
from torch._inductor import config as inductor_config
from torch._inductor import ir as inductor_ir
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen import wrapper as wrapper_code
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.fx_passes import post_grad
from torch._inductor.graph import GraphLowering, SubgraphLowering
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import _SingleLevelFunction as FunctionBase
from torch.export import _trace as exporting
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.jit._fuser import optimized_execution
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _global_buffer_registration_hooks as buffer_registration_hooks
from torch.nn.utils._named_member_accessor import NamedMemberAccessor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

try:  # objects that are inputs of a graph, such as a DeviceMesh: since 2.12
    from torch._functorch._aot_autograd.graph_compile import is_opaque_node
except ImportError:

    def is_opaque_node(node: Any) -> bool:
        return False


__all__ = [
    "TANGENTS_GO",
    "BufferAOTInput",
    "CustomPartitionerFn",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "ForwardTokenAOTInput",
    "FunctionBase",
    "FunctionalTensor",
    "GradAOTOutput",
    "GraphLowering",
    "HigherOrderOperator",
    "InductorChoices",
    "InputMutationAOTOutput",
    "NamedMemberAccessor",
    "OpOverload",
    "ParamAOTInput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "PythonWrapperCodegen",
    "Scheduler",
    "ShardedGroup",
    "ShardedParameter",
    "StorageWeakRef",
    "SubgraphLowering",
    "TangentAOTInput",
    "TorchDispatchMode",
    "V",
    "ViewBaseAOTInput",
    "WeakTensorKeyDictionary",
    "aot_eager",
    "autograd_nodes",
    "backward_start_ns",
    "buffer_bytes",
    "buffer_registration_hooks",
    "buffer_strides",
    "clear_library_workspaces",
    "compile_call",
    "compile_call_of",
    "compile_fx",
    "compile_fx_inner",
    "export_grad_modes",
    "exporting",
    "extract_forward_backward",
    "fake_like",
    "fake_modes",
    "flop_registry",
    "forget_output_strides",
    "frame_id",
    "free_unbacked_symbols",
    "functorch_config",
    "has_graph_break",
    "has_storage",
    "in_functorch",
    "inductor_config",
    "inductor_ir",
    "invoke_subgraph",
    "is_fake",
    "is_kept_by_no_graph",
    "is_leaf_node",
    "is_numbered_before",
    "is_opaque_node",
    "is_traceable_wrapper_subclass",
    "joint_graph",
    "keeps_graph",
    "local",
    "memory_events",
    "meta_like",
    "no_dispatch",
    "no_dispatch_modes",
    "not_compiled",
    "optimized_execution",
    "outermost_module",
    "outside_dynamo",
    "own_attributes",
    "past_dynamo",
    "plain_type",
    "post_grad",
    "profiler_is_running",
    "publish",
    "pytree",
    "running_sequence_number",
    "runs_formula_of_torch",
    "sequence_number",
    "sharded_groups",
    "statically_known_true",
    "storage_key",
    "tracing_alone",
    "without_autocast",
    "wrapper_code",
]


TANGENTS_GO = hasattr(torch.autograd.Function, "boxed_grads_call")  # in backward, by AOTAutograd; not so in torch 2.11


def sequence_number() -> int:
    """What the next autograd node made on this thread is numbered with."""
    return _get_sequence_nr()


def running_sequence_number() -> int | None:
    """The number of the autograd node that runs now; None outside of backward, and for nodes without one."""
    node = torch._C._current_autograd_node()
    number = None if node is None else node._sequence_nr()
    return None if number is None or number >= 2**63 else number


def keeps_graph() -> bool:
    """Whether the backward that runs now leaves its graph for another one (`retain_graph=True`)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def runs_formula_of_torch() -> bool:
    """True while backward runs a derivative formula of torch's own, and no function of a model's."""
    node = torch._C._current_autograd_node()
    return node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction)


def autograd_nodes(tensor: torch.Tensor) -> set[Any]:
    """The autograd nodes that backward from `tensor` reaches."""
    found, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions]
    return found


def is_numbered_before(node: Any, number: int) -> bool:
    """Whether an autograd node was made before `sequence_number` was that, on the same thread; leaves' nodes never are."""
    return node._sequence_nr() < number


def is_leaf_node(node: Any) -> bool:
    """Whether an autograd node is the end of a leaf's gradient; `variable` is the leaf. (Functions may have that name too.)"""
    return type(node).__name__ == "AccumulateGrad"


def storage_key(tensor: torch.Tensor) -> int:
    """What tells two live storages apart, on every device, fake tensors included."""
    return tensor.untyped_storage()._cdata


def is_kept_by_no_graph(tensor: torch.Tensor) -> bool:
    """Whether it can be told that no compiled graph keeps a tensor for the backward of what it was computed in."""
    node: Any = tensor.grad_fn
    if node is None:
        return True
    is_compiled = type(node).__name__ == "CompiledFunctionBackward"  # AOTAutograd's
    saved = node._raw_saved_tensors if is_compiled else ()
    if not saved or any(one.unpack_hook is not None for one in saved):  # a hook may do anything, such as a forward
        return False
    kept = [one.data for one in saved if isinstance(one.data, torch.Tensor)]
    return all(storage_key(t) != storage_key(tensor) for t in kept if has_storage(t))


def has_storage(tensor: torch.Tensor) -> bool:
    """False for tensors of `torch.func`, and for sparse ones."""
    return tensor.layout is torch.strided and not is_functorch_wrapped_tensor(tensor)


def memory_events(profile: torch.profiler.profile, device_type: str = "cpu") -> Iterator[tuple[int, int]]:
    """(time in ns, bytes) of each allocation (positive) that a profile saw on a device and of its release (negative), in order.

    Releases of what was allocated before the profile are in it only if an earlier profile saw the allocation.
    """
    kind = DeviceType.CPU if device_type == "cpu" else DeviceType.CUDA
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = [event for event in events if event.name() == "[memory]" and event.device_type() == kind]
    return ((event.start_ns(), event.nbytes()) for event in sorted(found, key=lambda event: event.start_ns()))  # type: ignore[union-attr]


def backward_start_ns(profile: torch.profiler.profile) -> int | None:
    """When autograd evaluated its first node; None without a backward."""
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return min((e.start_ns() for e in events if e.name().startswith("autograd::engine::evaluate_function")), default=None)


def publish(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Write an artifact for `tlparse`, where TORCH_TRACE asks for it."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def joint_graph(
    module: fx.GraphModule, inputs: tuple[Any, ...], decompositions: dict[OpOverload, Callable[..., Any]]
) -> fx.GraphModule:
    """AOTAutograd's joint graph of a module with flat inputs; placeholders and outputs carry `meta["desc"]`."""
    with contextlib.ExitStack() as stack:
        return aot_export_joint_with_descriptors(stack, module, inputs, decompositions=decompositions).graph_module


def extract_forward_backward(
    joint: fx.GraphModule, saved: list[fx.Node], num_fwd_outputs: int, static_inputs: Sequence[int] | None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """AOTAutograd's own split of a joint graph at the given saved values."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    static = OrderedSet(placeholders[i] for i in static_inputs or ())
    opaque = [node for node in saved if is_opaque_node(node)]
    tensors = [node for node in saved if isinstance(node.meta.get("val"), torch.Tensor)]
    symbols = [node for node in saved if node not in opaque and node not in tensors]
    more: dict[str, Any] = {"saved_opaque_nodes": opaque} if opaque else {}
    return _extract_fwd_bwd_modules(
        joint, tensors, symbols, num_fwd_outputs=num_fwd_outputs, static_lifetime_input_nodes=static, **more
    )


def buffer_bytes(buffer: Any) -> int:
    """What Inductor allocates for a buffer of its wrapper code; 0 for what is no tensor."""
    if not isinstance(buffer, inductor_ir.Buffer | inductor_ir.TensorBox) or not buffer.has_tensor_output():
        return 0
    storage = V.graph.get_allocation_storage_size(buffer)  # type: ignore[arg-type]
    return int(V.graph.sizevars.optimization_hint(storage, fallback=0)) * buffer.get_dtype().itemsize


def buffer_strides(buffer: Any) -> tuple[int, ...] | None:
    """Strides of a buffer or view in Inductor's wrapper code, None for what is no tensor."""
    if not isinstance(buffer, inductor_ir.IRNode) or buffer.maybe_get_output_spec() is None or not buffer.has_tensor_output():
        return None
    return tuple(int(V.graph.sizevars.optimization_hint(stride, fallback=0)) for stride in buffer.get_stride())


def aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    compiler: Callable[..., Any],
    split: Callable[..., Any],
    decompositions: dict[OpOverload, Callable[..., Any]],
) -> Callable[..., Any]:
    """AOTAutograd with our partition, the halves run by `compiler`."""
    return aot_module_simplified(
        gm, inputs, fw_compiler=compiler, bw_compiler=compiler, partition_fn=split, decompositions=decompositions
    )


def forget_output_strides() -> None:
    """Those that an earlier compilation of the same graph reported; Inductor reports them once."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()


@contextlib.contextmanager
def tracing_alone() -> Iterator[None]:
    """No other thread traces or compiles meanwhile: it would meet our patches. Autograd does not look for NaN in values, and
    modes around the call that count or change ops do not see what is traced."""
    with (
        compile_lock,
        torch.autograd.set_detect_anomaly(False),
        _disable_current_modes() as modes,
        contextlib.ExitStack() as fake,
    ):
        for mode in modes:
            if isinstance(mode, FakeTensorMode):
                fake.enter_context(mode)
        yield


@contextlib.contextmanager
def outside_dynamo() -> Iterator[None]:
    """Compiling while a step runs, as Dynamo does it before: without what it knows of the model, and random state as it was."""
    with compile_lock, preserve_rng_state(), tracing(None):
        yield


def outermost_module() -> torch.nn.Module | None:
    """The module whose call led to this compilation: the outermost on the Python stack, None outside of any."""
    found = None
    for owner in _owners():
        if isinstance(owner, torch.nn.Module) and not isinstance(owner, fx.GraphModule):
            found = owner
    return found


def _owners() -> Iterator[Any]:
    """The `self` of each call of a module on the Python stack, and of what `torch.compile` made, innermost first. Nothing is
    read of other frames: before Python 3.13 that keeps all of their variables alive until they return."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CALLS:
            yield frame.f_locals.get("self")
        frame = frame.f_back


_CALLS = (
    torch._TorchCompileWrapper.__call__.__code__,
    torch.nn.Module._wrapped_call_impl.__code__,
    torch.nn.Module._call_impl.__code__,
)


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


def compile_call() -> Any:
    """What `torch.compile` made of the call that led to this compilation; None when Dynamo was called in another way."""
    return next((owner for owner in _owners() if isinstance(owner, torch._TorchCompileWrapper)), None)


def compile_call_of(compiled: Any) -> Any:
    """The same for a module or function that `torch.compile` returned; None for anything else."""
    for wrapper in (compiled, getattr(compiled, "_compiled_call_impl", None)):
        context = getattr(wrapper, "dynamo_ctx", None)
        if context is None:
            cells = inspect.getclosurevars(wrapper).nonlocals if inspect.isfunction(wrapper) else {}
            context = cells.get("self")
        backend = getattr(context, "callback", None)
        while backend is not None and not isinstance(backend, torch._TorchCompileWrapper):
            backend = getattr(backend, "_torchdynamo_orig_backend", None)
        if backend is not None:
            return backend
    return None


_F = TypeVar("_F", bound=Callable[..., Any])


def not_compiled(reason: str) -> Callable[[_F], _F]:
    """`torch.compiler.disable` with its type: called from compiled code the function runs as it is, or, where that allows no
    graph break, is an error that names the reason."""
    found: Callable[[_F], _F] = torch.compiler.disable(reason=reason)
    return found


without_autocast = torch._C._DisableAutocast  # on all devices at once, cheap enough for every op
no_dispatch_modes = _disable_current_modes  # so that real tensors stay real while a compiler is tracing


def profiler_is_running() -> bool:
    """True inside any torch profiler; two cannot run at once."""
    return _profiler_enabled()


def in_functorch() -> bool:
    """True inside a torch.func transform, where saved-tensor hooks do not work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def clear_library_workspaces() -> None:
    """Let cuBLAS give back the workspaces that it keeps; it takes them again when needed."""
    torch._C._cuda_clearCublasWorkspaces()


class ShardedParameter(NamedTuple):
    """A parameter under `fully_shard`: `shard` is this rank's part of it, a DTensor; `places` are the modules, and the name in
    each, that have it. It computes in `dtype`, and `is_split` by tensor parallelism even then."""

    shard: torch.nn.Parameter
    is_split: bool
    dtype: torch.dtype
    places: tuple[tuple[torch.nn.Module, str], ...]


class ShardedGroup(NamedTuple):
    """Parameters that `fully_shard` gathers together, in forward and backward of `module`.

    Between them they are let go of if `reshards`. Gradients are summed in `reduce_dtype` over `ranks`. Inputs of the module are
    cast to `input_dtype`, outputs to `output_dtype`, None: not at all.
    """

    module: torch.nn.Module
    parameters: tuple[ShardedParameter, ...]
    ranks: int
    process_group: Any
    reshards: bool
    reduce_dtype: torch.dtype | None
    input_dtype: torch.dtype | None
    output_dtype: torch.dtype | None


def sharded_groups(model: torch.nn.Module) -> tuple[ShardedGroup, ...]:
    """What `fully_shard` has done to a model, nothing where torch.distributed.fsdp was never imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return ()
    found: dict[int, ShardedGroup] = {}
    for module in model.modules():
        state: Any = module._get_fsdp_state() if isinstance(module, fsdp.FSDPModule) else None
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in (group for group in groups if group is not None and id(group) not in found):
            policy, mesh = group.mp_policy, group.mesh_info
            goes = group.post_forward_mesh_info is not None and not (module is model and state._auto_reshard_after_forward)
            found[id(group)] = ShardedGroup(
                module,
                tuple(_sharded_parameter(p, policy.param_dtype) for p in group.fsdp_params),
                mesh.shard_mesh_size,
                mesh.shard_process_group,
                goes,
                policy.reduce_dtype,
                policy.param_dtype if policy.cast_forward_inputs else None,
                policy.output_dtype,
            )
    return tuple(found.values())


def _sharded_parameter(found: Any, dtype: torch.dtype | None) -> ShardedParameter:
    at, shard = found._module_info, found.sharded_param
    places = [(at.module, at.param_name), *zip(at.shared_modules, at.shared_param_names, strict=True)]
    computes_in = dtype if dtype is not None and shard.dtype.is_floating_point else shard.dtype
    return ShardedParameter(shard, bool(found.is_dtensor), computes_in, tuple(places))


def is_fake(tensor: torch.Tensor) -> bool:
    """True for a tensor without memory of its own."""
    return isinstance(tensor, FakeTensor)


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """What code has set on a tensor, without what makes it a fake one."""
    names = _attributes_of_fakes()
    return {name: value for name, value in vars(tensor).items() if name not in names}


@functools.cache
def _attributes_of_fakes() -> frozenset[str]:
    with FakeTensorMode():
        return frozenset(vars(torch.nn.Parameter(torch.empty(0))))


def fake_modes(values: Iterable[Any]) -> set[FakeTensorMode]:
    """Those of the fake tensors among these."""
    return {value.fake_mode for value in values if isinstance(value, FakeTensor)}


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf like `tensor`; fake within a fake mode."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fake.requires_grad_(tensor.requires_grad)


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """Shape and type of a tensor alone, whatever mode is on."""
    with _disable_current_modes():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def plain_type(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a module before `fully_shard` changed it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return next(kind for kind in type(module).__mro__ if fsdp is None or not issubclass(kind, fsdp.FSDPModule))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that several share, or the tensor itself."""
    sharding = sys.modules.get("torch.distributed.tensor")
    return tensor.to_local() if sharding is not None and isinstance(tensor, sharding.DTensor) else tensor
