"""Copies that take their time, for tests of the order between them and compute."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from remat.transfer import Event, _HostLane, _StreamLane, host_tier


@contextlib.contextmanager
def slow_copies(device: torch.device, delay_s: float) -> Iterator[None]:
    """Each copy from and to a device waits for up to so long before it starts; on a CPU, on a thread beside compute."""
    tier = host_tier(device)
    lanes = tier.out, tier.back
    with ThreadPoolExecutor(1) as out, ThreadPoolExecutor(1) as back:
        if device.type == "cpu":
            tier.out, tier.back = _SlowHostLane(out, delay_s), _SlowHostLane(back, delay_s)
        else:
            tier.out, tier.back = _SlowStreamLane(device, delay_s), _SlowStreamLane(device, delay_s)
        try:
            yield
        finally:
            tier.out, tier.back = lanes


class _SlowHostLane(_HostLane):
    def __init__(self, thread: ThreadPoolExecutor, delay_s: float) -> None:
        self._thread, self._delay_s = thread, delay_s

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Event | None) -> Event:
        return _Later(self._thread.submit(self._slowly, target, source, *after))

    def _slowly(self, target: torch.Tensor, source: torch.Tensor, *after: Event | None) -> None:
        time.sleep(random.uniform(0, self._delay_s))
        super().copy(target, source, *after)


class _Later:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class _SlowStreamLane(_StreamLane):
    def __init__(self, device: torch.device, delay_s: float) -> None:
        super().__init__(device)
        self._pause = _Pause(delay_s)

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Event | None) -> Event:
        return super().copy(target, source, *after, self._pause)


class _Pause:
    """Makes the stream that waits for it sleep."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def wait(self) -> None:
        torch.cuda._sleep(int(random.uniform(0, self._delay_s) * 1e9))
