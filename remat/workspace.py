"""Scratch memory of kernels: what an op allocates while it runs, beyond its outputs.

It is in no graph (attention and convolution backward, norm backward on strided inputs), so each distinct op is run once
under the meter, on zeros of its real shapes, strides and dtypes, and remembered for the life of the process. The few that
take more for other values are run on such too. Ops that cannot have any (the common pointwise ops, views, copies, a CPU's
matrix products in full precision) are not run, nor those for which there is no room. What cuBLAS keeps from its first
product on is no op's own: `library_bytes`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from remat import _torch
from remat._torch import pytree
from remat.budget import free_bytes
from remat.measure import measure_accelerator, measure_cpu
from remat.passes.aliasing import made_numel, storage_bytes
from remat.passes.pinning import is_collective

log = logging.getLogger("remat")
aten = torch.ops.aten

_TIMES = 4  # what an op takes for its run, in sizes of its inputs: results and scratch memory are mostly no larger than those
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_KEEPS = aten.mkldnn_rnn_layer_backward.default  # runs on zeros; crashes if what its forward kept (its last tensor) is empty
_OPAQUE = {  # zeros crash the process: in the place of what only their forward can write, and as probabilities on a GPU
    aten._cudnn_rnn_backward.default, aten.miopen_rnn_backward.default,
    aten.multinomial.default,
}  # fmt: skip
_BY_VALUES = {aten.linalg_matrix_exp.default}  # it takes the powers of a matrix that its norm asks for, none of zeros
_SEEDS = {  # arguments that lie on the host whatever a fake tensor says, and that a kernel reads there
    aten._scaled_dot_product_efficient_attention_backward.default: (7, 8),
    aten._efficient_attention_backward.default: (12, 13),
}
_BAG_SIZES = {aten._embedding_bag_backward.default: 4}  # the argument with the sizes of bags: empty ones are passed over
_COPIES = {aten.clone.default, aten.copy_.default, aten._to_copy.default}
_SUMS = {aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default}
_EXACT = _SUMS | _COPIES | {
    aten.cat.default, aten.ones_like.default, aten.zeros_like.default, aten.full.default,
    aten.new_zeros.default, aten.zeros.default, aten.arange.start, aten.arange.default, aten.arange.start_step,
    aten.scalar_tensor.default, aten.slice_backward.default, aten.constant_pad_nd.default, aten.empty.memory_format,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar,
    aten.neg.default, aten.gelu.default, aten.gelu_backward.default, aten.silu.default, aten.silu_backward.default,
    aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.where.self,
    aten.threshold_backward.default, aten.exp.default,
}  # fmt: skip


@dataclass(frozen=True)
class TensorLike:
    """A tensor's metadata, hashable."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_conj: bool = False  # a conjugate view, which most kernels copy first

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorLike:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj())

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_gaps(self) -> bool:
        """True for a matrix with neither rows nor columns one after the other, which is what BLAS reads."""
        if len(self.shape) < 2:
            return False
        (rows, columns), (down, along) = self.shape[-2:], self.stride[-2:]
        return not ((along == 1 and down >= columns) or (down == 1 and along >= rows) or 1 in (rows, columns))

    @property
    def is_transposed(self) -> bool:
        """True for a matrix that lies column by column, which a CPU copies by blocks, through a buffer."""
        return len(self.shape) == 2 and self.stride == (1, self.shape[0])

    def tensor(self, random: bool = False) -> torch.Tensor:
        """Zeros, or normally distributed numbers where the dtype has them, laid out like this."""
        size = 0 if 0 in self.shape else 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        flat = torch.zeros(size, dtype=self.dtype, device=self.device)
        if random and self.dtype.is_floating_point and self.dtype.itemsize > 1:
            flat.normal_()
        tensor = flat.as_strided(self.shape, self.stride)
        return tensor.conj() if self.is_conj else tensor


@dataclass(frozen=True)
class Call:
    """An op and its arguments, tensors as `TensorLike`."""

    op: Any
    leaves: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, op: Any, args: Any, kwargs: Any) -> Call | None:
        """None for what cannot be run by itself: what is no op of torch's, and collectives, which wait for other ranks."""
        if not isinstance(op, _torch.OpOverload) or is_collective(op):
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(op, tuple(TensorLike.of(x) if isinstance(x, torch.Tensor) else x for x in leaves), spec)

    @property
    def tensors(self) -> list[TensorLike]:
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorLike)]

    @property
    def largest_bytes(self) -> int:
        """Of its inputs."""
        return max((tensor.bytes for tensor in self.tensors), default=0)

    @property
    def devices(self) -> set[torch.device]:
        return {tensor.device for tensor in self.tensors}

    @contextlib.contextmanager
    def ready(self, random: bool = False) -> Iterator[Callable[[], Any]]:
        """The call on tensors of its own, zeros or random numbers, to run as often as one likes: whatever mode the caller is
        in, and with the random state as before afterwards. Bags have one element each."""
        others = [device for device in self.devices if device.type != "cpu"]
        kind = others[0].type if others else "cpu"
        rng = torch.random.fork_rng(others, device_type=kind)
        with _torch.no_dispatch_modes(), _torch.without_autocast(), torch.no_grad(), rng:
            leaves = [leaf.tensor(random) if isinstance(leaf, TensorLike) else leaf for leaf in self.leaves]
            args, kwargs = pytree.tree_unflatten(leaves, self.spec)
            args = tuple(arg.cpu() if i in _SEEDS.get(self.op, ()) else arg for i, arg in enumerate(args))
            if self.op in _BAG_SIZES:
                args[_BAG_SIZES[self.op]].fill_(1)
            yield lambda: self.op(*args, **kwargs)

    @property
    def has_scratch(self) -> bool:
        """False for an op that allocates its results and nothing else."""
        if any(tensor.is_conj for tensor in self.tensors):
            return True
        if self.op in _PRODUCTS:  # a CPU's have some in half precision, and where it copies a matrix first
            return any(x.device.type != "cpu" or x.dtype.itemsize < 4 or x.has_gaps for x in self.tensors)
        if self.op in _COPIES and any(tensor.is_transposed for tensor in self.tensors):
            return True
        return self.op not in _EXACT or self._converts

    @property
    def _converts(self) -> bool:
        """True where an elementwise op or a sum reads types that differ, or are no floating point: a CPU copies those first."""
        types = {tensor.dtype for tensor in self.tensors if tensor.shape}
        if self.op in _SUMS:
            types |= {leaf for leaf in self.leaves if isinstance(leaf, torch.dtype)}
            return len(types) > 1 or not all(dtype.is_floating_point for dtype in types)
        return len(types - {torch.bool} if self.op is aten.where.self else types) > 1

    @property
    def key(self) -> tuple[str, str]:
        return str(self.op), repr(self.leaves)


_known: dict[tuple[str, str], int] = {}


def workspace_bytes(call: Call | None) -> int:
    """Bytes that the op allocates at its peak beyond what it returns; 0 on devices that allocate nothing (meta).

    An op that cannot be run by itself counts with its largest input. So does, for now, one not measured before while somebody
    else's profiler runs, and one that the device has no room to run.
    """
    if call is None or not call.has_scratch or any(device.type == "meta" for device in call.devices):
        return 0
    if call.key not in _known:
        found = _measured(call) if can_run(call) else None
        if found is None:
            return call.largest_bytes
        _known[call.key] = found
    return _known[call.key]


def can_run(call: Call) -> bool:
    """Whether the op may be run by itself, on numbers that mean nothing."""
    if call.op in _OPAQUE or (call.op is _KEEPS and not call.tensors[-1].bytes):
        return False
    if _torch.profiler_is_running():  # the meter is a profiler too, and two cannot run at once
        return False
    return has_room(call)


def has_room(call: Call) -> bool:
    """Whether the devices of an op have room to run it."""
    needed = _TIMES * sum(tensor.bytes for tensor in call.tensors)
    return all(needed <= free_bytes(device) for device in call.devices)


def _measured(call: Call) -> int | None:
    """None where it failed."""
    try:
        on_zeros = _run_once(call)
        return max(on_zeros, _run_once(call, random=True)) if call.op in _BY_VALUES else on_zeros
    except Exception as error:  # out of memory; zeros are no valid input for a few ops, and ops of others raise what they like
        log.debug("workspace of %s is unknown: %s", call.op, error)
        return None


@cache
def library_bytes(device: torch.device) -> int:
    """What libraries keep of the device's memory once a step has run: cuBLAS a workspace for each thread, forward's and
    backward's. Present from then on."""
    if device.type != "cuda":
        return 0
    _torch.clear_library_workspaces()
    before = torch.cuda.memory_allocated(device)
    with _torch.no_dispatch_modes(), torch.enable_grad():
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = (torch.zeros(*shape, dtype=dtype, device=device) for shape in ((16, 16), (16, 16), (16,)))
            torch.nn.functional.linear(x, weight.requires_grad_(), bias.requires_grad_()).sum().backward()
            del x, weight, bias
    return torch.cuda.memory_allocated(device) - before


def _run_once(call: Call, random: bool = False) -> int:
    results: list[Any] = []
    accelerator = next((device for device in call.devices if device.type != "cpu"), None)
    with call.ready(random) as run:
        keep = lambda: results.append(run())  # noqa: E731
        peak = measure_cpu(keep)[0] if accelerator is None else measure_accelerator(keep, accelerator).above_resident_bytes
    made: dict[int, int] = {}  # by storage; what a kernel shrinks its result from is no part of that
    for t in (leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)):
        size = max(storage_bytes(t), made_numel(call.op, call.tensors) * t.element_size())
        made[_torch.storage_key(t)] = max(size, made.get(_torch.storage_key(t), 0))
    return max(0, peak - sum(made.values()))
