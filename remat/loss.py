"""Cross-entropy over a large vocabulary, a share of the rows at a time.

Autograd keeps the logarithm of the softmax for backward, which makes two gradients of its size from it: with 128,256 words and
float32 that is most of a step's peak. `cross_entropy` keeps the logits alone, which the model returns anyway, and computes what
is needed of each share of rows in forward and again in backward. Every row goes through the kernels of PyTorch, and the rows'
losses through its sum, so that loss and gradients are the same numbers. A gradient of the gradient is not computed in shares,
and rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

aten = torch.ops.aten

SHARES = 16
_IGNORED = -100  # no class, as `ignore_index` may be one


def _shares(logits: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    rows = -(-logits.shape[0] // SHARES)
    for start in range(0, logits.shape[0], rows):
        share = slice(start, start + rows)
        yield share, logits[share], target[share]


@torch.library.custom_op("remat::cross_entropy", mutates_args=())
def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, dtype: torch.dtype, widen: bool, reduction: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and total weight as `aten.nll_loss_forward` gives them, of `aten._log_softmax` of `logits` cast to `dtype`.

    logits: rows x classes. target: a class for each row, or `ignore_index`. widen: as `half_to_float` there. reduction: 1 for
    the mean, 2 for the sum.
    """
    known = target != ignore_index
    picked = []
    for share, part, _ in _shares(logits, target):
        rows = torch.where(known[share], target[share], 0)
        picked.append(aten._log_softmax(part.to(dtype), 1, widen).gather(1, rows.unsqueeze(1)))
    column = torch.where(known, 0, _IGNORED)
    loss, weight = aten.nll_loss_forward(torch.cat(picked), column, None, reduction, _IGNORED)
    return loss, weight


@cross_entropy.register_fake
def _(
    logits: torch.Tensor, target: torch.Tensor, dtype: torch.dtype, widen: bool, *_: int
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = torch.float32 if widen else dtype
    return logits.new_empty((), dtype=kind), logits.new_empty((), dtype=kind)


def _gradient_of(
    gradient: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, dtype: Any, widen: bool, *how: int
) -> torch.Tensor:
    """The gradient of some rows, in `dtype`, by kernels that have derivatives. how: reduction and ignored class."""
    log_softmax = aten._log_softmax(logits.to(dtype), 1, widen)
    loss = aten.nll_loss_backward(gradient, log_softmax, target, None, *how, weight)
    found: torch.Tensor = aten._log_softmax_backward_data(loss, log_softmax, 1, dtype)
    return found


@torch.library.custom_op("remat::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    gradient: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    widen: bool,
    reduction: int,
    ignore_index: int,
) -> torch.Tensor:
    """The gradient of `logits`. gradient: of the loss. weight: the total weight that forward returned."""
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for share, part, rows in _shares(logits, target):
        result[share] = _gradient_of(gradient, part, rows, weight, dtype, widen, reduction, ignore_index)
    return result


@cross_entropy_backward.register_fake
def _(gradient: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, target, *ctx.rest = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
    logits, target, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a gradient of the gradient, which needs all of it
        return _gradient_of(gradient, logits, target, weight, *ctx.rest).to(logits.dtype), *[None] * 5
    return cross_entropy_backward(gradient, logits, target, weight, *ctx.rest), *[None] * 5


cross_entropy.register_autograd(_backward, setup_context=_setup)
