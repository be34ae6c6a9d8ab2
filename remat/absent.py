"""Planning for a device that is not there: the model as fake CPU tensors, which take no memory whatever their size.

On fake CPU tensors fused attention is one op that saves its output and log-sum-exp, as on a GPU; on `meta` it decomposes into
its quadratic form. Scratch memory cannot be measured on a device that is not there; `scratch_bytes` estimates it from how the
CUDA kernels work, and has not been held against one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from remat import _torch
from remat._torch import pytree
from remat.loss import SHARES, cross_entropy, cross_entropy_backward
from remat.resident import attributes_of
from remat.workspace import Call

aten = torch.ops.aten

LIBRARY_BYTES = 2 * 32 * 2**20  # cuBLAS on Hopper, for forward's thread and backward's (8 MiB each before); see library_bytes
_ATTENTION_BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
}
_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}


def stand_in(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A copy of the model and its example inputs on fake CPU tensors. Nothing is allocated, wherever they are."""
    mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    memo: dict[int, Any] = {id(b): fake(b) for b in model.buffers()}
    for p in model.parameters():
        twin = memo[id(p)] = nn.Parameter(fake(p), requires_grad=p.requires_grad)
        twin.grad = fake(p.grad) if p.grad is not None else None
        own = _torch.own_attributes(p)  # what dequantises it
        vars(twin).update(own)
        memo.update((id(value), value) for value in own.values())
    for tensor in attributes_of(model):  # those with values keep them; what a forward computed (weight_norm) cannot be copied
        memo.setdefault(id(tensor), tensor if tensor.device.type == "cpu" and tensor.is_leaf else fake(tensor))
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: fake(t).requires_grad_(t.requires_grad), (args, kwargs))
    return copy.deepcopy(model, memo), args, kwargs


def scratch_bytes(call: Call | None) -> int:
    """Scratch memory of a CUDA kernel, in bytes: attention's backward sums the query's gradient in float32 beside a row of
    the size of log-sum-exp; a convolution is given what its largest tensor takes."""
    if call is None:
        return 0
    tensors = call.tensors
    if call.op in _ATTENTION_BACKWARD:
        query = tensors[1]
        elements = query.bytes // query.dtype.itemsize
        return 4 * (elements + elements // query.shape[-1])
    if call.op in (cross_entropy._opoverload, cross_entropy_backward._opoverload):
        share = max(tensors, key=lambda tensor: tensor.bytes)  # of the logits, in float32: cast, softmax, and gradients of both
        return 4 * 4 * share.bytes // share.dtype.itemsize // SHARES
    if call.op in _CONVOLUTIONS:
        return max(tensor.bytes for tensor in tensors)
    return 0
