"""What real kernels return where torch's fake ones leave something out.

A CPU's recurrent layers (oneDNN's, behind `nn.LSTM`): the fake kernels say that forward keeps nothing for backward, where it
keeps more than it returns, and return one tensor as the gradient of both biases, where there are two. Losses that are summed
in place return a scalar in the storage of all that was summed.
"""

from __future__ import annotations

from typing import Any

import torch

from remat._torch import OpOverload
from remat.passes.aliasing import summed_shape
from remat.workspace import Call, has_room

aten = torch.ops.aten

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
    shape = summed_shape(op, args, result)
    return result if shape is None else result.new_empty(shape).resize_(())


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
