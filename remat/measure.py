"""What a step really allocated.

On an accelerator these are its allocator's own statistics (`torch.accelerator`). On a CPU they are the allocator events of
`torch.profiler.profile(profile_memory=True)`, on top of what was allocated when the step began: the storages of all tensors
that `fn` can reach (its closure, the globals it names, modules, optimizers).
"""

from __future__ import annotations

import contextlib
import dis
import functools
import os
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from remat._torch import local, memory_events, profiler_is_running, storage_key
from remat.errors import RematError


@dataclass(frozen=True)
class Measurement:
    """`peak_bytes` is the allocator's peak while `fn` ran, `resident_bytes` what was there before; `time_s` is wall time."""

    peak_bytes: int
    resident_bytes: int
    time_s: float

    @property
    def above_resident_bytes(self) -> int:
        return self.peak_bytes - self.resident_bytes


def measure(fn: Callable[[], object]) -> Measurement:
    """Run `fn()` once, in place, and count what the allocator did: an accelerator's, whose peak statistics are reset first, if
    `fn` can reach a tensor there."""
    tensors = reachable(fn)
    accelerator = next((t.device for t in tensors if t.device.type not in ("cpu", "meta")), None)
    if accelerator is not None:
        return measure_accelerator(fn, accelerator)
    with resident_storages(tensors) as (total, released):
        above, seconds = measure_cpu(fn, released)
    return Measurement(total + above, total, seconds)


@contextlib.contextmanager
def resident_storages(tensors: list[torch.Tensor]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Bytes of the CPU storages of `tensors`, and a list that fills with (time in ns, -bytes) of those that go.

    The list given is emptied, so that they can.
    """
    resident = list({storage_key(t): t.untyped_storage() for t in tensors if t.device.type == "cpu"}.values())
    tensors.clear()
    released: list[tuple[int, int]] = []
    watches = [weakref.finalize(storage, _note, released, storage.nbytes()) for storage in resident]
    total = sum(storage.nbytes() for storage in resident)
    resident.clear()
    try:
        yield total, released
    finally:
        for watch in watches:
            watch.detach()


def _note(released: list[tuple[int, int]], size: int) -> None:
    released.append((time.time_ns(), -size))


def measure_cpu(fn: Callable[[], object], released: Sequence[tuple[int, int]] = ()) -> tuple[int, float]:
    """Peak bytes allocated above the start while `fn` runs, and its wall time in seconds.

    released: (time in ns, -bytes) of memory that was there before and went meanwhile; `fn` may add to it.
    """
    profile, seconds = profiled(fn)
    return max([0, *(live for _, live in live_bytes(profile, released))]), seconds


def profiled(fn: Callable[[], object]) -> tuple[torch.profiler.profile, float]:
    """Run `fn()` under the profiler, which sees what is allocated; the profile, and wall time in seconds. What `fn` returns is
    held to its end."""
    if profiler_is_running():
        raise RematError("a profiler is running, and what is measured here is with another; two cannot run at once")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop on stderr otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        start = time.perf_counter()
        result = fn()
        seconds = time.perf_counter() - start
    del result
    return profile, seconds


def live_bytes(
    profile: torch.profiler.profile, released: Sequence[tuple[int, int]] = (), device_type: str = "cpu"
) -> Iterator[tuple[int, int]]:
    """(time in ns, bytes allocated above the start) after each event of a profile, in order."""
    own = ((at, amount, 0) for at, amount in memory_events(profile, device_type))
    live = before = 0
    for at, amount, gone in sorted([*own, *((at, 0, amount) for at, amount in released)], key=lambda event: event[0]):
        live = max(0, live + amount)  # below zero it is memory of an earlier profile that goes
        before += gone
        yield at, live + before


def measure_accelerator(fn: Callable[[], object], device: torch.device) -> Measurement:
    """Run `fn()` once and read the allocator's statistics of `device`."""
    torch.accelerator.synchronize(device)
    resident = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    start = time.perf_counter()
    fn()
    torch.accelerator.synchronize(device)
    return Measurement(torch.accelerator.max_memory_allocated(device), resident, time.perf_counter() - start)


def reachable(fn: Callable[[], object]) -> list[torch.Tensor]:
    """The tensors that `fn` can reach: through its closure, the globals it names, modules, optimizers; and their gradients."""
    found = [item for item in reach([fn]) if isinstance(item, torch.Tensor)]
    return [local(tensor) for tensor in found]


def reach(roots: Iterable[object], not_through: type | tuple[type, ...] = ()) -> Iterator[object]:
    """All objects that these lead to, each once; but not through objects of some types."""
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, not_through):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, torch.Tensor):
            if item.is_leaf and item.grad is not None:
                stack.append(item.grad)
            continue
        stack.extend(_referents(item))


def _referents(item: object) -> Iterable[object]:
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
        names = () if item.__globals__.get("__name__", "").startswith("torch.") else _names(item.__code__)
        used = [item.__globals__[name] for name in names if name in item.__globals__]
        return [*cells, *used, *(item.__defaults__ or ())]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset | deque):
        return list(item)
    if isinstance(item, type | types.ModuleType | types.BuiltinFunctionType | types.CodeType):
        return ()
    return list(getattr(item, "__dict__", {}).values())


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> set[str]:
    """The globals that code reads; `co_names` has attributes among them."""
    nested = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}.union(*nested)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable not assigned yet
        return False
