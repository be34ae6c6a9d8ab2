"""`remat::offload`, `remat::reload` and `remat::wait`: a tensor's way to the host and back as ops, for compiled graphs.

offload(x, stride) -> Tensor                  x in host memory, flat, as it would lie with these strides; copied beside compute
reload(host, size, stride, device) -> Tensor  memory on the device, which a copy back is filling
wait(x) -> ()                                 compute may read what `reload` returned from here on

A compiler lays tensors out as it sees fit; flat host memory and strides that are written down do not depend on that. Host
memory comes from the pool of the device and returns to it when the host tensor dies. On a GPU the memory of x is let go of when
the copy has read it (`Tensor.record_stream`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from remat._torch import storage_key
from remat.transfer import Event, HostBuffer, host_tier

_ANY_LAYOUT = (torch.Tag.flexible_layout,)  # else Inductor hands over copies in the layout that the op was traced with
_lent: dict[int, HostBuffer] = {}
_arriving: dict[int, Event] = {}


@torch.library.custom_op("remat::offload", mutates_args=(), tags=_ANY_LAYOUT)
def offload(x: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Start to copy `x` to the host. `stride` has no holes and no overlaps."""
    tier = host_tier(x.device)
    buffer = tier.pool.take(x.numel() * x.element_size())
    host = buffer.fresh().view(x.dtype)
    buffer.busy = tier.out.copy(torch.as_strided(host, x.shape, stride), x, buffer.busy)
    tier.out.holds(x)
    key = storage_key(host)
    _lent[key] = buffer
    weakref.finalize(host.untyped_storage(), _give_back, key, x.device)
    return host


@offload.register_fake
def _(x: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    return torch.empty(x.numel(), dtype=x.dtype, device="cpu")


def _give_back(key: int, device: torch.device) -> None:
    host_tier(device).pool.give(_lent.pop(key))


@torch.library.custom_op("remat::reload", mutates_args=(), tags=_ANY_LAYOUT)
def reload(host: torch.Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device) -> torch.Tensor:
    """Start to copy what `offload` returned back to the device."""
    back = torch.empty_strided(size, stride, dtype=host.dtype, device=device)
    buffer, source = _lent[storage_key(host)], torch.as_strided(host, size, stride)
    buffer.busy = _arriving[storage_key(back)] = host_tier(back.device).back.copy(back, source, buffer.busy)
    return back


@reload.register_fake
def _(host: torch.Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=host.dtype, device=device)


@torch.library.custom_op("remat::wait", mutates_args={"x"}, tags=_ANY_LAYOUT)
def wait(x: torch.Tensor) -> None:
    """Make compute wait for the copy that fills `x`."""
    _arriving.pop(storage_key(x)).wait()


@wait.register_fake
def _(x: torch.Tensor) -> None:
    return None


OFFLOAD, RELOAD, WAIT = torch.ops.remat.offload.default, torch.ops.remat.reload.default, torch.ops.remat.wait.default
