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


@pytest.mark.parametrize("in_flight", [0, "2"])
def test_not_a_number_of_forwards(in_flight: int) -> None:
    model, x = models.mlp()
    with pytest.raises(remat.RematError, match="not a number of forwards"):
        remat.plan(model, (x,), budget=None, in_flight=in_flight)
