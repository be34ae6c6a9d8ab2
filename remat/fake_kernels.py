"""What real kernels return where torch's fake ones leave something out.

A CPU's recurrent layers (oneDNN's, behind `nn.LSTM`): the fake kernels say that forward keeps nothing for backward, where it
keeps more than it returns, and return one tensor as the gradient of both biases, where there are two. Some
kernels make their result as large as an input and then shrink it: a mean of losses lies in the storage of all of them. And
the fake gradient of dropout has the layout of CUDA's, where a CPU's is that of a product, and that of layer norm the layout of
its gradient, where the real one is contiguous.
"""

from __future__ import annotations

from typing import Any

import torch

from remat._torch import OpOverload
from remat.passes.aliasing import made_numel
from remat.workspace import Call, has_room

aten = torch.ops.aten

# What derivatives of gather, indexing, max and their like do to zeros that they have made: out of place where a mode watches.
IN_PLACE_IN_FORMULAS = {
    aten.scatter_add.default,
    aten.scatter.src,
    aten.index_put.default,
    aten.index_add.default,
    aten.put.default,
    aten.masked_scatter.default,
}

_FORWARD, _BACKWARD = aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default
_KEPT, _SECOND_BIAS = 3, 4  # which of their results these are

_ROUGHLY = 17  # what is kept, in sizes of the largest input: 0.5 to 16.3 on four layers

_known: dict[tuple[str, str], int] = {}


def as_run(op: OpOverload, args: Any, kwargs: Any, result: Any) -> Any:
    """What the op's real kernel returns, by what its fake one has returned."""
    if op is _FORWARD and torch.is_grad_enabled():
        return _replaced(result, _KEPT, result[_KEPT].new_empty(_kept_bytes(Call.of(op, args, kwargs))))
    if op is _BACKWARD:
        return _replaced(result, _SECOND_BIAS, torch.empty_like(result[_SECOND_BIAS]))
    if op is aten.native_dropout_backward.default and result.device.type == "cpu":
        gradient, mask = args[:2]
        return gradient * mask
    if op is aten.native_layer_norm_backward.default and result[0] is not None:
        return _replaced(result, 0, result[0].contiguous())
    if (numel := made_numel(op, args)) and numel > result.numel():
        return result.new_empty(numel).as_strided(result.shape, result.stride())
    return result


def _replaced(results: tuple[torch.Tensor, ...], at: int, by: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*results[:at], by, *results[at + 1 :])


def _kept_bytes(call: Call | None) -> int:
    """The library alone knows, so the layer is run once on zeros, if there is room."""
    if call is None or any(device.type != "cpu" for device in call.devices):
        return 0
    if call.key not in _known:
        if not has_room(call):
            return _ROUGHLY * call.largest_bytes
        with call.ready() as run, torch.enable_grad():
            _known[call.key] = run()[_KEPT].nbytes
    return _known[call.key]
