"""Everything private of torch that remat uses, in one place. A new torch release touches this file only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors, aot_module_simplified
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode
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
    "aot_module_simplified",
    "extract_forward_backward",
    "flop_registry",
    "in_functorch",
    "joint_graph",
    "memory_events",
    "pytree",
    "specializing",
    "storage_key",
    "watch_for_opaque_autograd",
]


def storage_key(tensor: torch.Tensor) -> int:
    """What tells two live storages apart, on every device, fake tensors included."""
    return tensor.untyped_storage()._cdata


def memory_events(profile: torch.profiler.profile) -> Iterator[int]:
    """Bytes of each CPU allocation (positive) and release (negative) that a profile saw, in order."""
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = [event for event in events if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU]
    return (event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))


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
