"""The planned step as PyTorch's memory viewer (pytorch.org/memory_viz) opens it.

A snapshot is what `torch.cuda.memory._snapshot()` returns, pickled: the allocations and releases of one step in order, each
with a kind, and with the module that it is for in the place of a stack trace. Addresses are those of a first-fit allocator.
"""

from __future__ import annotations

import pickle
from bisect import insort
from typing import Any

from remat.plan import Plan, Storage

_UNKNOWN = "unknown"  # a category that the viewer needs to see


def to_snapshot(plan: Plan) -> bytes:
    """The snapshot as a pickle of plain data, protocol 4 (the newest that the viewer reads)."""
    return pickle.dumps(snapshot(plan), protocol=4)


def snapshot(plan: Plan) -> dict[str, Any]:
    """The snapshot as data. Its peak is that of the timeline."""
    born: dict[int, list[Storage]] = {}
    dies: dict[int, list[Storage]] = {}
    for storage in plan.storages:
        born.setdefault(storage.born, []).append(storage)
        dies.setdefault(storage.dies, []).append(storage)
    heap = _Heap()
    at: dict[int, int] = {}
    events: list[dict[str, Any]] = []
    last = len(plan.timeline) - 1
    for index, moment in enumerate(plan.timeline):
        for storage in born.get(index, ()):
            at[id(storage)] = heap.allocate(storage.bytes)
            events.append(_event("alloc", storage, at[id(storage)], moment.start_us))
        for storage in dies.get(index, ()) if index < last else ():
            heap.free(at[id(storage)], storage.bytes)
            events += [_event(how, storage, at[id(storage)], moment.end_us) for how in ("free_requested", "free_completed")]
    if all(event.get("category") != _UNKNOWN for event in events):
        nothing = Storage("nothing", "others", 0, 0, last, "")
        events.append(_event("alloc", nothing, heap.end, plan.timeline[last].end_us))
    remaining = sorted((at[id(storage)], storage) for storage in dies.get(last, ()))
    allocated = sum(storage.bytes for _, storage in remaining)
    segment = {
        "device": 0,
        "address": 0,
        "total_size": heap.end,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": allocated,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": _blocks(remaining, heap.end),
    }
    return {"segments": [segment], "device_traces": [events], "allocator_settings": {}, "external_annotations": []}


def _event(action: str, storage: Storage, address: int, time_us: float) -> dict[str, Any]:
    event = {
        "action": action,
        "addr": address,
        "size": storage.bytes,
        "stream": 0,
        "time_us": int(time_us),
        "frames": _frames(storage),
    }
    return {**event, "category": _category(storage)} if action == "alloc" else event


def _category(storage: Storage) -> str:
    return _UNKNOWN if storage.kind == "others" else storage.kind


def _frames(storage: Storage) -> list[dict[str, Any]]:
    return [{"name": storage.name, "filename": storage.module or storage.kind, "line": 0}]


def _blocks(remaining: list[tuple[int, Storage]], end: int) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    address = 0
    for start, storage in remaining:
        if start > address:
            blocks.append(_gap(address, start - address))
        size = storage.bytes
        own = {"address": start, "size": size, "requested_size": size, "state": "active_allocated"}
        blocks.append({**own, "frames": _frames(storage)})
        address = start + size
    return [*blocks, _gap(address, end - address)] if end > address else blocks


def _gap(address: int, size: int) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": 0, "state": "inactive", "frames": []}


class _Heap:
    """First fit: `end` is the highest address used so far."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []  # address, size

    def allocate(self, size: int) -> int:
        for i, (address, room) in enumerate(self._free):
            if room >= size:
                self._free[i : i + 1] = [(address + size, room - size)] if room > size else []
                return address
        self.end += size
        return self.end - size

    def free(self, address: int, size: int) -> None:
        insort(self._free, (address, size))
        i = self._free.index((address, size))
        merged = self._free[i]
        low = high = i
        if i and sum(self._free[i - 1]) == address:
            low, merged = i - 1, (self._free[i - 1][0], self._free[i - 1][1] + size)
        if i + 1 < len(self._free) and sum(merged) == self._free[i + 1][0]:
            high, merged = i + 1, (merged[0], merged[1] + self._free[i + 1][1])
        self._free[low : high + 1] = [merged]
