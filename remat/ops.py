"""`remat::offload`, `remat::reload` and `remat::wait`: a tensor's way to the host and back as ops, for compiled graphs.

offload(x) -> Tensor      a copy of x in host memory, with its strides; the copy runs beside compute
reload(host, device) -> Tensor    memory on the device, which a copy back is filling
wait(x) -> ()             compute may read what `reload` returned from here on

Host memory comes from the pool of the device and returns to it when the host tensor dies. On a GPU the memory of x is let go
of when the copy has read it (`Tensor.record_stream`).
"""

from __future__ import annotations

import weakref

import torch

from remat._torch import storage_key
from remat.transfer import Event, HostBuffer, host_tier

_lent: dict[int, HostBuffer] = {}
_arriving: dict[int, Event] = {}


@torch.library.custom_op("remat::offload", mutates_args=())
def offload(x: torch.Tensor) -> torch.Tensor:
    """Start to copy `x`, which is dense, to the host."""
    tier = host_tier(x.device)
    buffer = tier.pool.take(x.numel() * x.element_size())
    host = torch.as_strided(buffer.fresh().view(x.dtype), x.shape, x.stride())
    buffer.busy = tier.out.copy(host, x, buffer.busy)
    tier.out.holds(x)
    key = storage_key(host)
    _lent[key] = buffer
    weakref.finalize(host.untyped_storage(), _give_back, key, x.device)
    return host


@offload.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


def _give_back(key: int, device: torch.device) -> None:
    host_tier(device).pool.give(_lent.pop(key))


@torch.library.custom_op("remat::reload", mutates_args=())
def reload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start to copy what `offload` returned back to the device."""
    back = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    buffer = _lent[storage_key(host)]
    buffer.busy = _arriving[storage_key(back)] = host_tier(back.device).back.copy(back, host, buffer.busy)
    return back


@reload.register_fake
def _(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


@torch.library.custom_op("remat::wait", mutates_args={"x"})
def wait(x: torch.Tensor) -> None:
    """Make compute wait for the copy that fills `x`."""
    _arriving.pop(storage_key(x)).wait()


@wait.register_fake
def _(x: torch.Tensor) -> None:
    return None


OFFLOAD, RELOAD, WAIT = torch.ops.remat.offload.default, torch.ops.remat.reload.default, torch.ops.remat.wait.default
