"""The trade-off: what each argument of `frontier` does; tests/test_in_flight.py has `in_flight`."""

from __future__ import annotations

import itertools

import pytest
import torch

import remat
from remat.devices import DEVICES
from tests.models import mlp


def test_points() -> None:
    model, x = mlp()
    few, many = (remat.frontier(model, (x,), points=points) for points in (2, 8))
    assert len(few) == 2 < len(many) <= 8
    assert (few[0].peak_bytes, few[-1].peak_bytes) == (many[0].peak_bytes, many[-1].peak_bytes)
    for a, b in itertools.pairwise(many):
        assert a.peak_bytes > b.peak_bytes
        assert a.step_us < b.step_us


def test_the_optimizers_state_is_resident() -> None:
    model, x = mlp()
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    plain, with_state = remat.frontier(model, (x,), points=2), remat.frontier(model, (x,), points=2, optimizer=optimizer)
    assert [b.peak_bytes - a.peak_bytes for a, b in zip(plain, with_state, strict=True)] == [weights, weights]


def test_values_may_wait_on_the_host() -> None:
    model, x = mlp(rows=512)
    assert not any(plan.host_bytes for plan in remat.frontier(model, (x,), points=3))
    assert any(plan.host_bytes for plan in remat.frontier(model, (x,), points=3, host_budget="1GiB"))


def test_pins() -> None:
    model, x = mlp()
    names = [a.name for block in remat.plan(model, (x,), budget=None).blocks for a in block.activations if "gelu" in a.op]
    assert names
    free = remat.frontier(model, (x,), points=3)
    held = remat.frontier(model, (x,), points=3, pin={"::aten.gelu.default": "SAVE"})
    assert any(plan.decisions[name] is remat.Decision.RECOMPUTE for plan in free for name in names)
    assert all(plan.decisions[name] is remat.Decision.SAVE for plan in held for name in names)


def test_costs_and_device() -> None:
    model, x = mlp()
    there = remat.frontier(model, (x,), points=2, device="h100")
    assert {plan.device for plan in there} == {DEVICES["h100"].name}
    assert there[0].step_us < remat.frontier(model, (x,), points=2)[0].step_us
    with pytest.raises(remat.RematError, match="costs='measured' needs the device itself"):
        remat.frontier(model, (x,), costs="measured", device="h100")


def test_a_budget_below_all_of_them_is_an_error() -> None:
    model, x = mlp()
    with pytest.raises(remat.BudgetError, match="no plan fits in 1000 B; the smallest needs") as caught:
        remat.frontier(model, (x,), budget=1000, points=3)
    least = caught.value.minimum_bytes
    assert least is not None
    assert caught.value.where
    assert [plan.peak_bytes for plan in remat.frontier(model, (x,), budget=least, points=3)] == [least]
