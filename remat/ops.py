"""A tensor's way to the host and back as ops, for compiled graphs.

offload(x, stride) -> Tensor                  x in host memory, flat, as it would lie with these strides; copied beside compute
release(x, host) -> ()                        compute has waited for that copy, and x may go
reload(host, size, stride, device) -> Tensor  memory on the device, which a copy back is filling
wait(x) -> ()                                 compute may read what `reload` returned from here on

A compiler lays tensors out as it sees fit; flat host memory and strides that are written down do not depend on that. Host
memory comes from the pool of the device and returns to it when the host tensor dies. `offload` keeps x until `release`, so that
its memory goes at a known place of the graph, and never while the copy reads it: the bytes in flight are bounded by where the
graph lets go, whatever the host's lead over the device (which `Tensor.record_stream` would leave to chance).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from remat._torch import storage_key
from remat.transfer import Event, HostBuffer, host_tier

_ANY_LAYOUT = (torch.Tag.flexible_layout,)  # else Inductor hands over copies in the layout that the op was traced with


@dataclass
class _Lent:
    """A host buffer behind a host tensor, and the tensor that was copied into it until it is released."""

    buffer: HostBuffer
    source: torch.Tensor | None

    def release(self) -> None:
        if self.source is not None:
            assert self.buffer.busy is not None
            self.buffer.busy.wait()
            self.source = None


_lent: dict[int, _Lent] = {}
_arriving: dict[int, Event] = {}


@torch.library.custom_op("remat::offload", mutates_args=(), tags=_ANY_LAYOUT)
def offload(x: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Start to copy `x` to the host. `stride` has no holes and no overlaps."""
    tier = host_tier(x.device)
    with tier.pool.lending(x.nbytes) as buffer:
        host = buffer.fresh(x.nbytes).view(x.dtype)
        buffer.busy = tier.out.copy(torch.as_strided(host, x.shape, stride), x, buffer.busy)
    key = storage_key(host)
    _lent[key] = _Lent(buffer, x)
    weakref.finalize(host.untyped_storage(), _give_back, key, x.device)
    return host


@offload.register_fake
def _(x: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    return torch.empty(x.numel(), dtype=x.dtype, device="cpu")


def _give_back(key: int, device: torch.device) -> None:
    lent = _lent.pop(key)
    lent.release()
    host_tier(device).pool.give(lent.buffer)


@torch.library.custom_op("remat::release", mutates_args={"host"}, tags=_ANY_LAYOUT)
def release(x: torch.Tensor, host: torch.Tensor) -> None:
    """Make compute wait for the copy of `x` to `host`, which is whole from here on."""
    _lent[storage_key(host)].release()


@release.register_fake
def _(x: torch.Tensor, host: torch.Tensor) -> None:
    return None


@torch.library.custom_op("remat::reload", mutates_args=(), tags=_ANY_LAYOUT)
def reload(host: torch.Tensor, size: Sequence[int], stride: Sequence[int], device: torch.device) -> torch.Tensor:
    """Start to copy what `offload` returned back to the device."""
    back = torch.empty_strided(size, stride, dtype=host.dtype, device=device)
    lent, source = _lent[storage_key(host)], torch.as_strided(host, size, stride)
    lent.release()
    buffer = lent.buffer
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


OFFLOAD, RELEASE = torch.ops.remat.offload.default, torch.ops.remat.release.default
RELOAD, WAIT = torch.ops.remat.reload.default, torch.ops.remat.wait.default
