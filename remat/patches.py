"""What torch does otherwise while remat exports or compiles a model: each a context, after which torch is as it was."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx

from remat._torch import (
    FakeTensor,
    FunctionalTensor,
    NamedMemberAccessor,
    PythonWrapperCodegen,
    Scheduler,
    SubgraphLowering,
    V,
    buffer_registration_hooks,
    export_grad_modes,
    exporting,
    inductor_config,
    no_dispatch_modes,
    optimized_execution,
    own_attributes,
    post_grad,
)

# ---- while Inductor compiles ----


def reading_wrapper_code(
    estimate: Callable[[Sequence[Any]], Any],
    read: Callable[[Sequence[Any]], list[str]],
    read_subgraph: Callable[[Sequence[Any]], None],
) -> contextlib.AbstractContextManager[Any]:
    """Inductor hands the lines of its wrapper code to `read` once it has planned their allocations, and puts the comments that
    come back into the code. It reuses buffers by what `estimate` makes of the lines without reuse, which stands in for its own
    `EfficientPeakEstimate`. `read_subgraph` gets the lines of graphs within the graph, before its own are planned."""
    plan = PythonWrapperCodegen.memory_plan_reuse

    def plan_and_read(self: PythonWrapperCodegen) -> None:
        if isinstance(V.graph, SubgraphLowering):
            plan(self)
            read_subgraph(self.lines)
            return
        with inductor_config.patch(allow_buffer_reuse=False):
            plan(self)
        self.estimate_peak = estimate(self.lines)  # type: ignore[has-type]
        plan(self)
        for comment in read(self.lines):
            self.header.writeline(f"{self.comment} {comment}")

    return mock.patch.object(PythonWrapperCodegen, "memory_plan_reuse", plan_and_read)


def adding_products(can_wait: Callable[[fx.Node, fx.Node], bool]) -> contextlib.AbstractContextManager[Any]:
    """Inductor makes one op of a matrix product and a sum that it is a term of only where `can_wait` says of the two that the
    product may run as late as the sum."""
    is_unfused = post_grad.should_prefer_unfused_addmm

    def is_apart(match: Any) -> bool:
        total = match.output_node()
        products = [node for node in match.nodes if node is not total]
        return is_unfused(match) or not all(can_wait(product, total) for product in products)

    return mock.patch.object(post_grad, "should_prefer_unfused_addmm", is_apart)


def freeing_before(is_needed: Callable[[Any, Any], bool]) -> contextlib.AbstractContextManager[Any]:
    """Inductor lets go of what the kernels between two library calls have read when the second is due, and a C++ function holds
    all of them. Now also before a scheduler's node of which `is_needed` says so."""
    enter = Scheduler.enter_context

    def enter_context(scheduler: Any, node: Any) -> None:
        if is_needed(scheduler, node):
            scheduler.flush()
        enter(scheduler, node)

    return mock.patch.object(Scheduler, "enter_context", enter_context)


# ---- while a model is exported ----


def here(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` on the thread that calls this, `theirs` on all others, which may be training meanwhile."""
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (ours if threading.get_ident() == thread else theirs)(*args, **kwargs)

    return call


@contextlib.contextmanager
def specializing(single: Sequence[bool]) -> Iterator[None]:
    """Let a model take its eager paths while it is exported.

    Libraries ask `torch.compiler.is_exporting()` to choose slower code that serves any input (transformers: explicit causal
    masks, repeated key and value heads). A captured graph here serves one kind of call and is never deployed. Dynamo, which
    export runs on the branches of `torch.cond`, is told the truth.

    single: for each look that transformers takes at positions, whether it would find one sequence in each row whatever the
    inputs are. It needs values for that, and takes rows for packed without. Before 5.18 it also asks whether there is tracing
    where it has no padding mask to read.
    """
    masks = sys.modules.get("transformers.masking_utils")
    looked, traces = (getattr(masks, name, None) for name in ("find_packed_sequence_indices", "is_tracing"))
    asked = torch.compiler.is_exporting
    honest = asked.__code__
    asked.__code__ = _is_dynamo_exporting.__code__  # another function in its place would get into tables that Dynamo makes once
    coming = iter(single)

    def look(ids: torch.Tensor) -> torch.Tensor | None:
        return None if next(coming, False) or looked is None else looked(ids)

    def is_tracing(tensor: torch.Tensor | None = None) -> bool:
        return tensor is not None and traces is not None and bool(traces(tensor))

    there: dict[str, Any] = {}
    if looked and traces:
        there = {"find_packed_sequence_indices": here(look, looked), "is_tracing": here(is_tracing, traces)}
    try:
        with mock.patch.multiple(masks, **there) if there else contextlib.nullcontext():
            yield
    finally:
        asked.__code__ = honest


def _is_dynamo_exporting() -> bool:
    """What `torch.compiler.is_exporting` does meanwhile. It has only the names of that module."""
    import sys

    import torch

    return torch.compiler._is_exporting_flag and sys._getframe(1).f_globals["__name__"].startswith("torch._dynamo")


@contextlib.contextmanager
def quiet_trials() -> Iterator[None]:
    """No error in the log where an op has no kernel for what it is given: it is raised as well, and transformers tries kernels
    for its experts so, and takes others. Nor on stderr the graph as far as it got where export fails."""
    log = logging.getLogger("torch._subclasses.fake_tensor")

    def is_less(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    log.addFilter(is_less)
    try:
        with mock.patch.object(exporting, "print", create=True):
            yield
    finally:
        log.removeFilter(is_less)


@contextlib.contextmanager
def grad_modes_in_autocast() -> Iterator[None]:
    """Let export keep a `no_grad` that is within autocast. It looks for parts of a model that begin with a change of grad mode;
    within autocast each part begins with entering that anew."""
    first: Any = vars(export_grad_modes)["nodes_first"]

    def first_after_autocast(nodes: Any, is_it: Callable[[fx.Node], bool]) -> fx.Node | None:
        return first(nodes, lambda node: is_it(node) and node.target is not torch.amp.autocast_mode._enter_autocast)

    with mock.patch.object(export_grad_modes, "nodes_first", first_after_autocast):
        yield


@contextlib.contextmanager
def buffers_registered_as_before() -> Iterator[None]:
    """An export that fails leaves a hook behind, which lets nobody register a buffer any more (torch 2.11)."""
    before = dict(buffer_registration_hooks)
    try:
        yield
    finally:
        for number in [number for number in buffer_registration_hooks if number not in before]:
            del buffer_registration_hooks[number]


@contextlib.contextmanager
def keeping_attributes() -> Iterator[None]:
    """What stands for a model's parameters while it is exported has their attributes: quantised weights have there what
    dequantises them (`quant_state` of bitsandbytes)."""
    swap = NamedMemberAccessor.swap_tensor

    def swap_and_keep(self: NamedMemberAccessor, name: str, tensor: torch.Tensor, allow_missing: bool = False) -> torch.Tensor:
        before = swap(self, name, tensor, allow_missing)
        stands_in = isinstance(tensor, FakeTensor | FunctionalTensor) and not isinstance(before, FunctionalTensor)
        if stands_in and isinstance(before, torch.Tensor):
            vars(tensor).update(own_attributes(before))
        return before

    with mock.patch.object(NamedMemberAccessor, "swap_tensor", here(swap_and_keep, swap)):
        yield


def without_backward() -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd traces no backward, which is half of its work: nothing has a gradient."""

    def no_gradients(outputs: Any, inputs: Sequence[Any], *_: Any, **__: Any) -> tuple[None, ...]:
        return (None,) * len(inputs)

    return mock.patch.object(torch.autograd, "grad", here(no_gradients, torch.autograd.grad))


@contextlib.contextmanager
def native_kernels() -> Iterator[None]:
    """Keep some kernels of torch's that it decomposes in Python while it traces: those for upsampling, which as gathers and
    products need several times the memory in a step that runs them one by one, and those of the margin losses, which are
    other numbers (of several labels, those that are none count). Dropout that drops nothing is no copy, as eagerly."""
    packets = [getattr(torch.ops.aten, name) for name in (*_UPSAMPLING, *_MARGIN_LOSSES)]
    composite: dict[Any, Any] = {getattr(packet, overload): None for packet in packets for overload in packet.overloads()}
    composite[torch.ops.aten.dropout.default] = _dropout
    kernels = {(op, key): kernel for op, kernel in composite.items() for key in _COMPOSITE}
    kernels[torch.ops.aten.bernoulli_.float, torch._C.DispatchKey.Autograd] = _bernoulli_
    before = [(op, key, op.py_kernels.get(key)) for op, key in kernels]
    for (op, key), kernel in kernels.items():
        _set_kernel(op, key, kernel)
    try:
        yield
    finally:
        for op, key, kernel in before:
            _set_kernel(op, key, kernel)


def _set_kernel(op: Any, key: torch._C.DispatchKey, kernel: Callable[..., Any] | None) -> None:
    """Have an op decomposed by a function of Python's, or by none."""
    op._dispatch_cache.clear()
    if kernel is None:
        op.py_kernels.pop(key, None)
    else:
        op.py_kernels[key] = kernel


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """torch's own is a clone where nothing is dropped, draws where all is, and rounds otherwise than a CPU does: in half
    precision, and in single its scale for some `p` (0.15, 0.45)."""
    if not train or not p:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    if input.device.type == "cpu":
        if input.dtype.itemsize < 4:
            return input * (_drawn(input, 1 - p) / (1 - p))
        scale, native = _scales(p, input.dtype)
        if scale != native:
            return _masked(input, p, scale)[0]
    return torch.ops.aten.native_dropout(input, p, train)[0]


def dropout_by_mask(input: torch.Tensor, p: float, train: bool | None) -> Any:
    """`native_dropout` as a CPU has it, in ops of which one draws: the result may be computed again from the mask."""
    if input.device.type != "cpu" or train is False or not p < 1:
        return NotImplemented
    return _masked(input, p, _scales(p, input.dtype)[1])


def _scales(p: float, dtype: torch.dtype) -> tuple[float, float]:
    """What dropout multiplies by, as its own kernel on a CPU rounds it and as that of `native_dropout` does."""
    with no_dispatch_modes():
        return torch.ones((), dtype=dtype).div(1 - p).item(), torch.tensor(1 / (1 - p), dtype=dtype).item()


def _masked(input: torch.Tensor, p: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _drawn(torch.empty_like(input, dtype=torch.bool), 1 - p)
    return input.mul(mask).mul(scale), mask


def _bernoulli_(input: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """As a function, which it becomes, torch's draws in the order of indices, not as numbers lie in memory."""
    if not input.is_contiguous() and generator is None:
        return input.copy_(_drawn(input, p))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.aten.bernoulli_.float(input, p, generator=generator)


def _drawn(like: torch.Tensor, p: float) -> torch.Tensor:
    """`torch.empty_like(like).bernoulli_(p)` as a function: one number after the other as they lie in memory."""
    strides = torch.empty_like(like).stride()
    order = sorted(range(like.dim()), key=lambda dim: -strides[dim])
    drawn = torch.ops.aten.bernoulli.p(like.detach().permute(order), p)
    return drawn.permute(sorted(range(like.dim()), key=order.__getitem__))


_UPSAMPLING = [
    *(f"{kind}nearest{exact}{size}d" for kind, exact in (("upsample_", ""), ("_upsample_", "_exact")) for size in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
]
_MARGIN_LOSSES = ("multi_margin_loss", "multilabel_margin_loss_forward")
_COMPOSITE = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextlib.contextmanager
def interpreting_scripts() -> Iterator[None]:
    """Functions and modules of torch.jit run op by op. After two calls they are compiled, with a backward that is one autograd
    node of their own and no ops, so that a graph would have none of it."""

    def interpreted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(script: Any, *args: Any, **kwargs: Any) -> Any:
            script._debug_flush_compilation_cache()
            with optimized_execution(False):
                return run(script, *args, **kwargs)

        return here(call, run)

    with contextlib.ExitStack() as stack:
        for kind in (torch.jit.ScriptFunction, torch._C.ScriptMethod):
            stack.enter_context(mock.patch.object(kind, "__call__", interpreted(kind.__call__)))
        yield
