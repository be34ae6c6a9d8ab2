"""Several forwards before the first backward, as in a pipeline's stages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import remat
from tests import models


def _pipelined(model: nn.Module, batches: list[torch.Tensor], in_flight: int) -> None:
    """1F1B: a backward for each forward, once as many as may be are in flight."""
    waiting = []
    for x in batches:
        waiting.append(model(x))
        if len(waiting) == in_flight:
            waiting.pop(0).backward()
    for loss in waiting:
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [2, 4])
@pytest.mark.parametrize("whole_model", [True, False])
def test_the_budget_is_for_all_of_them(in_flight: int, whole_model: bool) -> None:
    torch.manual_seed(0)
    model, x = models.mlp(rows=256)
    batches = [torch.randn_like(x) for _ in range(6)]
    plain = copy.deepcopy(model)
    remat.enable(model, 0.6, whole_model=whole_model, in_flight=in_flight)
    measured = []
    for each in (plain, model):
        for _ in range(2):
            each.zero_grad()
            torch.manual_seed(1)
            step = remat.measure(lambda each=each: _pipelined(each, batches, in_flight))
        measured.append(step.peak_bytes - (len(batches) - in_flight) * x.nbytes)  # batches that are not in flight yet
    plan = remat.plan_of(model)
    assert plan is not None
    assert plan.budget_bytes is not None
    assert measured[1] <= plan.peak_bytes <= plan.budget_bytes
    assert not whole_model or plan.peak_bytes > 0.95 * plan.budget_bytes
    assert plan.peak_bytes < plan.baseline_peak_bytes
    assert measured[1] < measured[0]
    assert plan.peak_bytes < 1.1 * measured[1]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_no_room_for_all_of_them() -> None:
    model, x = models.mlp(rows=256)
    one = remat.plan(model, (x,), budget=None).peak_bytes
    with pytest.raises(remat.BudgetError, match="with 50 forwards in flight") as caught:
        remat.plan(model, (x,), budget=one, in_flight=50)
    least = caught.value.minimum_bytes
    assert least is not None
    assert remat.plan(model, (x,), budget=least, in_flight=50).peak_bytes <= least


@pytest.mark.slow
def test_formulas_and_plans_for_a_range_count_all_of_them() -> None:
    model, x = models.mlp()
    shapes = {"x": {0: "rows"}}
    plan = remat.plan(model, (x,), budget=0.7, in_flight=3, dynamic_shapes=shapes)
    assert plan.peak_bytes_at(rows=64) == pytest.approx(plan.peak_bytes, rel=1e-3)
    alone = remat.plan(model, (x,), budget=0.7, dynamic_shapes=shapes)
    for rows in (64, 48):
        served = remat.plan(model, (x[:rows],), budget=None, plan=alone, in_flight=4)
        assert served.dropped == alone.dropped
        everything = remat.plan(model, (x[:rows],), budget=None, in_flight=4).peak_bytes
        assert alone.peak_bytes_at(rows=rows) < served.peak_bytes < everything
        held = remat.plan(model, (x[:rows],), budget=served.peak_bytes - 1, plan=alone, in_flight=4)
        assert held.peak_bytes < served.peak_bytes


@pytest.mark.slow
def test_fit_and_the_frontier_count_all_of_them() -> None:
    model, x = models.mlp()
    plans = remat.frontier(model, (x,), in_flight=3, points=3)
    fastest = remat.plan(model, (x,), budget=None, in_flight=3)
    assert plans[0].peak_bytes == fastest.peak_bytes
    assert all(plan.baseline_peak_bytes == fastest.peak_bytes for plan in plans)
    assert plans[-1].peak_bytes < plans[0].peak_bytes
    found = remat.fit(model, (x,), budget=2**21, in_flight=3)
    assert found.size < remat.fit(model, (x,), budget=2**21).size
    there = remat.plan(model, (torch.randn(found.size, 32),), budget=2**21, in_flight=3)
    assert there.decisions == found.plan.decisions


@pytest.mark.parametrize("in_flight", [0, "2"])
def test_not_a_number_of_forwards(in_flight: int) -> None:
    model, x = models.mlp()
    with pytest.raises(remat.RematError, match="not a number of forwards"):
        remat.plan(model, (x,), budget=None, in_flight=in_flight)
