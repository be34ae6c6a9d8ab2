"""Measured times of ops (`costs="measured"`): each distinct op is run a few times on its device, on random numbers of its real
shapes, strides and dtypes, and its time is kept on disk for later plans and processes."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from remat.devices import cache_file, write_figures
from remat.errors import RematError
from remat.workspace import Call, can_run

log = logging.getLogger("remat")

COSTS = ("analytic", "measured")
_RUNS = 7
_FLUSH_BYTES = 2**28  # more than the caches of an accelerator hold


def check_costs(costs: str) -> None:
    """Raises RematError when there is no such source of costs."""
    if costs not in COSTS:
        raise RematError(f"costs={costs!r} is unknown; there are {', '.join(map(repr, COSTS))}")


class OpTimes:
    """The times known for a device, in microseconds by op and arguments, and the file they come from and go to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.path = cache_file(device, "ops")
        self._known = _read(self.path)
        self._fresh: dict[str, float | None] = {}

    def time_us(self, call: Call, estimate_us: float) -> float:
        """Time of one call, measured now if it never was. The estimate for an op that does not run on random numbers."""
        key = " ".join(call.key)
        if key not in self._known and key not in self._fresh:
            self._fresh[key] = _measured(call, self.device)
        found = self._known.get(key, self._fresh.get(key))
        return estimate_us if found is None else found

    def save(self) -> None:
        """Write what was measured, beside what other processes have written meanwhile."""
        fresh = {key: time for key, time in self._fresh.items() if time is not None}
        if not fresh:
            return
        self._known = {**_read(self.path), **fresh}
        if write_figures(self.path, self._known):
            self._fresh = {key: time for key, time in self._fresh.items() if time is None}


@cache
def op_times(device: torch.device) -> OpTimes:
    """The times known for a device; the same object each time."""
    return OpTimes(device)


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: time for key, time in found.items() if isinstance(time, float)} if isinstance(found, dict) else {}


def _measured(call: Call, device: torch.device) -> float | None:
    if not can_run(call):
        return None
    try:
        with call.ready(random=True) as run:
            run()
            return _on_cpu(run) if device.type == "cpu" else _on_accelerator(run, device)
    except Exception as error:  # ops of others raise what they like
        log.debug("%s cannot be timed: %s", call.op, error)
        return None


def _on_accelerator(run: Callable[[], object], device: torch.device) -> float:
    """The median over runs, each with cold caches and launched while the device is still busy."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [[torch.Event(device, enable_timing=True) for _ in range(2)] for _ in range(_RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.accelerator.synchronize(device)
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events)


def _on_cpu(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
