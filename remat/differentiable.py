"""Ops that have derivatives in the place of some that have none.

A joint graph has a backward of its own. Of the graph that is captured here forward alone is run, under autograd again; so none
of its ops may be one that only functionalization makes and autograd does not know, or not for complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from remat._torch import OpOverload

aten = torch.ops.aten


def _copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `copy_` becomes; in the layout of `into`, where that is no part of something larger."""
    found = source.to(device=into.device, dtype=into.dtype, non_blocking=non_blocking)
    found = found if found.shape == into.shape else found.expand_as(into)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(into.shape, into.stride(), strict=True))
    if extent != into.numel():
        return found
    order = sorted(range(into.dim()), key=into.stride, reverse=True)
    return found.permute(order).contiguous().permute([order.index(d) for d in range(into.dim())])


def _slice_scatter(into: torch.Tensor, source: torch.Tensor, dim: int = 0, *where: Any, **step: Any) -> torch.Tensor:
    return _by_parts(aten.slice_scatter.default, into, source, dim, *where, **step)


def _select_scatter(into: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    return _by_parts(aten.select_scatter.default, into, source, dim, index)


def _by_parts(op: OpOverload, into: torch.Tensor, source: torch.Tensor, dim: int, *where: Any, **step: Any) -> Any:
    """Complex numbers as their real and imaginary parts, which are one more dimension, the last."""
    if not into.is_complex():
        return NotImplemented
    parts = (torch.view_as_real(tensor.resolve_conj()) for tensor in (into, source))
    return torch.view_as_complex(op(*parts, dim % into.dim(), *where, **step))


DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
}
