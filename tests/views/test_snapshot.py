"""Snapshots of the planned step: what PyTorch's own reader makes of them."""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import pytest
from torch.cuda import _memory_viz

import remat
from remat.views.snapshot import _Heap
from tests.views.cases import with_copies, with_recompute

PLANS = pytest.mark.parametrize("make", [with_recompute, with_copies])


def read(plan: remat.Plan) -> dict[str, Any]:
    return pickle.loads(plan.to_snapshot())


@PLANS
def test_the_peak_of_its_events_is_the_plans(make: Any) -> None:
    plan = make()
    live = peak = 0
    for event in read(plan)["device_traces"][0]:
        live += {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)
        peak = max(peak, live)
    assert peak == plan.peak_bytes
    assert live == plan.timeline[-1].live_bytes == read(plan)["segments"][0]["allocated_size"]


@PLANS
def test_nothing_overlaps(make: Any) -> None:
    taken: dict[int, int] = {}
    for event in read(make())["device_traces"][0]:
        start, end = event["addr"], event["addr"] + event["size"]
        assert end < 2**53
        if event["action"] == "alloc":
            assert all(end <= other or start >= stop for other, stop in taken.items() if stop > other)
            taken[start] = end
        elif event["action"] == "free_completed":
            assert taken.pop(start) == end
    assert max(taken.values()) <= read(make())["segments"][0]["total_size"]


@PLANS
def test_pytorchs_reader_takes_it(make: Any) -> None:
    found = read(make())
    text = _memory_viz.trace(found)
    assert f"{len(found['device_traces'][0])} entries" in text
    assert "segments: 1" in _memory_viz.segsum(found)
    assert "MemoryViz" in _memory_viz.trace_plot(found)
    assert "MemoryViz" in _memory_viz.segment_plot(found)


@PLANS
def test_the_viewer_finds_what_it_needs(make: Any, tmp_path: Any) -> None:
    data = make().to_snapshot(tmp_path / "step.pickle")
    assert (tmp_path / "step.pickle").read_bytes() == data
    assert next(pickletools.genops(io.BytesIO(data)))[1] == 4
    events = read(make())["device_traces"][0]
    categories = {event["category"] for event in events if event["action"] == "alloc"}
    assert {"unknown", "activations", "parameters"} <= categories
    frames = {event["frames"][0]["filename"] for event in events}
    assert any(".mlp" in frame for frame in frames)
    assert all(isinstance(frame["filename"], str) for event in events for frame in event["frames"])


def test_it_is_plain_data() -> None:
    ops = {op.name for op, _, _ in pickletools.genops(with_recompute().to_snapshot())}
    assert not ops & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ"}


def test_the_heap_fills_and_joins_gaps() -> None:
    heap = _Heap()
    a, b, c, d = (heap.allocate(10) for _ in range(4))
    assert (a, b, c, d, heap.end) == (0, 10, 20, 30, 40)
    heap.free(b, 10)
    assert heap.allocate(4) == 10
    heap.free(10, 4)
    heap.free(d, 10)
    heap.free(c, 10)
    assert heap.allocate(30) == 10
    assert heap.end == 40
