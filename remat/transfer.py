"""Storages on their way to host memory and back.

A lane is a stream of its own for each direction, ordered against compute by events only: nothing here waits for the whole
device. Memory is taken on the compute stream, and let go of only after compute has been made to wait for the copy, so that the
allocator never hands it out while a copy reads or writes it. Host buffers have the exact size (no powers of two), lie
outside of torch's allocator, are pinned where the device is a GPU, and are used again in the next step: pinning costs
milliseconds each. There are never more of them than were in use at once. On a CPU the host tier is a plain copy, done at once.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Protocol

import torch

from remat.budget import format_bytes
from remat.errors import RematError

_LARGER = 1.25


class Event(Protocol):
    """A moment on a stream; `wait` makes compute wait for it, without blocking the host where the device has streams."""

    def wait(self) -> None: ...


class HostBuffer:
    """Host memory for one storage, pinned for `device`, as uint8 in `bytes`. `busy` is the last copy from or to it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.busy: Event | None = None
        if device.type in ("cpu", "cuda"):
            self._memory = memoryview(mmap.mmap(-1, size))
            self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
            if device.type == "cuda":
                _pin(self.bytes, device)
                weakref.finalize(self, _unpin, self.bytes.data_ptr())
        else:
            self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def fresh(self, size: int) -> torch.Tensor:
        """The first bytes as a tensor with a storage of its own, whose death tells when nobody uses them."""
        return torch.from_numpy(self.bytes.numpy()[:size])


def _pin(memory: torch.Tensor, device: torch.device) -> None:
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code:
        with contextlib.suppress(RuntimeError, AssertionError):  # CUDA tells the next kernel of it too
            torch.zeros(1, device=device)
        raise RematError(
            f"cannot pin {format_bytes(memory.nbytes)} of host memory (cudaHostRegister returned {code}); lower host_budget=, "
            "or raise the limit on locked memory (ulimit -l)"
        )


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class HostPool:
    """The host buffers of one device. `bytes` is all that it holds, `in_use_bytes` what is lent, both in bytes.

    It holds no more than was lent at once, so that steps of ever other sizes do not add up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = self.in_use_bytes = self.made = 0
        self._most_in_use = 0
        self._idle: list[HostBuffer] = []  # those given back last come last
        self._lock = threading.RLock()  # backward has threads of its own, and a collection in `take` may give buffers back

    def take(self, size: int) -> HostBuffer:
        """A buffer of `size` bytes, used before where there is one; a little larger rather than let go of others for it."""
        with self._lock:
            buffer = self._idle_one(size) or self._new_one(size)
            self.in_use_bytes += buffer.bytes.nbytes
            self._most_in_use = max(self._most_in_use, self.in_use_bytes)
            return buffer

    def _idle_one(self, size: int) -> HostBuffer | None:
        largest = size if self.bytes + size <= self._most_in_use else _LARGER * size
        fitting = (buffer for buffer in self._idle if size <= buffer.bytes.nbytes <= largest)
        found = min(fitting, key=lambda buffer: buffer.bytes.nbytes, default=None)
        if found is not None:
            self._idle.remove(found)
        return found

    def _new_one(self, size: int) -> HostBuffer:
        limit = max(self._most_in_use, self.in_use_bytes + size)
        if self._idle and self.bytes + size > limit and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # copies may still read or write what is let go of
        while self._idle and self.bytes + size > limit:
            self.bytes -= self._idle.pop(0).bytes.nbytes
        buffer = HostBuffer(size, self.device)
        self.bytes += size
        self.made += 1
        return buffer

    @contextlib.contextmanager
    def lending(self, size: int) -> Iterator[HostBuffer]:
        """`take`, undone if what follows fails."""
        buffer = self.take(size)
        try:
            yield buffer
        except BaseException:
            self.give(buffer)
            raise

    def give(self, buffer: HostBuffer) -> None:
        with self._lock:
            self.in_use_bytes -= buffer.bytes.nbytes
            self._idle.append(buffer)

    def clear(self) -> None:
        """Free the buffers that are not lent."""
        with self._lock:
            self._idle.clear()
            self.bytes = self._most_in_use = self.in_use_bytes


class Lane(Protocol):
    """Copies in one direction."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Event | None) -> Event: ...


class _HostLane:
    """Copies within host memory, at once."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Event | None) -> Event:
        for event in after:
            if event is not None:
                event.wait()
        with torch.no_grad():
            target.copy_(source)
        return _Done()


class _Done:
    def wait(self) -> None: ...


class _StreamLane:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.Stream(device)
        self._entering = threading.Lock()  # a stream can be entered by one thread at a time, and backward has its own

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Event | None) -> Event:
        self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))
        with self._entering, self._stream, torch.no_grad():
            for event in after:
                if event is not None:
                    event.wait()  # on this stream, which is the current one here
            target.copy_(source, non_blocking=True)
            event = torch.Event(self._stream.device)
            event.record()
        return event


class HostTier:
    """Where a device's values go: a pool of host buffers and a lane for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.pool = HostPool(device)
        on_host = device.type == "cpu"
        self.out: Lane = _HostLane() if on_host else _StreamLane(device)
        self.back: Lane = _HostLane() if on_host else _StreamLane(device)


@cache
def host_tier(device: torch.device) -> HostTier:
    """The host tier of a device; the same one each time."""
    if device.type in ("meta", "mps"):  # without memory, without streams
        raise RematError(f"offload is not supported on {device.type}; plan with host_budget=0")
    return HostTier(device)


class Moved:
    """A storage whose bytes are on their way to the host, there, or on their way back.

    release: let go of the device memory, after the copy out. reload: start the copy back. tensor: the bytes on the device
    again, once compute may read them. The buffer returns to the pool with the last reference to this.
    """

    __slots__ = ("__weakref__", "_arrived", "_back", "_buffer", "_copied", "_device", "_host", "_there", "_tier")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._device = storage.device
        self._tier = host_tier(self._device)
        self._there: torch.Tensor | None = _bytes_of(storage)
        self._back: torch.Tensor | None = None
        self._arrived: Event | None = None
        with self._tier.pool.lending(storage.nbytes()) as buffer:
            self._host = buffer.bytes[: storage.nbytes()]
            self._copied: Event = self._tier.out.copy(self._host, self._there, buffer.busy)
        buffer.busy = self._copied
        self._buffer: HostBuffer | None = buffer

    def release(self) -> None:
        if self._there is not None:
            self._copied.wait()
            self._there = None

    def reload(self) -> None:
        if self._there is not None or self._back is not None:
            return
        assert self._buffer is not None, "a value was asked for after it had come back and gone"
        self._back = torch.empty(self._host.nbytes, dtype=torch.uint8, device=self._device)
        self._arrived = self._buffer.busy = self._tier.back.copy(self._back, self._host, self._copied)

    def tensor(self) -> torch.Tensor:
        """The bytes, as a uint8 tensor over a storage of the original's size. Gives the host buffer back."""
        if self._there is None:
            self.reload()
            self._arrive()
        result = self._there if self._there is not None else self._back
        assert result is not None
        self._there = self._back = None
        self._give_back()
        return result

    def _arrive(self) -> None:
        if self._arrived is not None:
            self._arrived.wait()
            self._arrived = None

    def _give_back(self) -> None:
        if self._buffer is not None:
            self._copied.wait()
            self._tier.pool.give(self._buffer)
            self._buffer = None

    def __del__(self) -> None:
        if getattr(self, "_buffer", None) is not None:  # a graph was dropped without backward, or part of it
            self._arrive()
            self._give_back()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
