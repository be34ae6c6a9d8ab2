"""What the allocator did, counted."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import remat

MIB = 2**20


def ones(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


def test_the_peak_is_not_the_sum() -> None:
    def step() -> None:
        for _ in range(3):
            a = ones(4)
            b = ones(2)
            del a, b

    found = remat.measure(step)
    assert found.peak_bytes == 6 * MIB
    assert found.resident_bytes == 0
    assert found.above_resident_bytes == 6 * MIB
    assert found.time_s > 0


def test_what_the_step_can_reach_is_resident() -> None:
    model, x, rest = nn.Linear(256, 256), ones(1), {"list": [ones(1)]}
    model.weight.grad = torch.zeros_like(model.weight)

    def step() -> None:
        ones(2)
        _ = model, x, rest

    weights = 2 * 256 * 256 * 4 + 256 * 4
    found = remat.measure(step)
    assert found.resident_bytes == weights + 2 * MIB
    assert found.peak_bytes == found.resident_bytes + 2 * MIB


def test_a_global_counts_where_it_is_read() -> None:
    """Not where an attribute has its name; a function within the step reads it, too."""
    code = "def by_name(): return kept\ndef by_attribute(): return x.kept\ndef within(): return (lambda: kept)()\n"
    functions: dict[str, Any] = {"kept": ones(2), "x": None}
    exec(code, functions)
    functions["x"] = type("Holder", (), {"kept": None})
    for name, mib in (("by_name", 2), ("by_attribute", 0), ("within", 2)):
        assert remat.measure(functions[name]).resident_bytes == mib * MIB


def test_a_storage_counts_once() -> None:
    x = ones(4)
    views = [x[:10], x.view(2, -1), x]
    assert remat.measure(lambda: views).resident_bytes == 4 * MIB


def test_optimizer_state_and_bound_methods_are_reached() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    parameters = (64 * 64 + 64) * 4
    found = remat.measure(optimizer.zero_grad)
    assert 4 * parameters <= found.resident_bytes <= 4 * parameters + 64


def test_memory_freed_by_the_step_makes_room() -> None:
    held = [ones(8)]

    def step() -> None:
        held.clear()
        ones(2)

    found = remat.measure(step)
    assert found.resident_bytes == 8 * MIB
    assert found.peak_bytes == 8 * MIB


def test_a_peak_before_the_release_counts() -> None:
    held = [ones(8)]

    def step() -> None:
        ones(2)
        held.clear()

    assert remat.measure(step).peak_bytes == 10 * MIB


class Cycle:
    """Garbage that only the cycle collector frees."""

    def __init__(self) -> None:
        self.me = self
        self.tensor = ones(8)


def test_garbage_from_before_is_not_counted_when_it_goes() -> None:
    gc.collect()
    gc.disable()
    try:
        remat.measure(Cycle)  # the profiler sees those blocks go that it saw come

        def step() -> None:
            gc.collect()
            ones(2)

        assert remat.measure(step).peak_bytes == 2 * MIB
    finally:
        gc.enable()


def test_a_step_is_not_measured_within_a_profiler() -> None:
    profiling = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiling, pytest.raises(remat.RematError, match="a profiler is running"):
        remat.measure(lambda: ones(1))


def test_an_error_in_the_step_comes_through() -> None:
    def step() -> None:
        raise ValueError("in the step")

    with pytest.raises(ValueError, match="in the step"):
        remat.measure(step)
    assert remat.measure(lambda: ones(1)).peak_bytes == MIB


def test_it_runs_the_step_once() -> None:
    calls: list[Any] = []
    remat.measure(lambda: calls.append(1))
    assert calls == [1]
