"""A plan given with `plan=`: its decisions are simulated on the step at hand, and held to the budget there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import remat
from tests.models import mlp


def test_a_plan_larger_than_the_budget_is_refused_with_the_numbers() -> None:
    model, x = mlp()
    big = remat.plan(model, (x,), budget=None)
    said = rf"the plan given needs .* \({big.peak_bytes} bytes\), at .*leave plan= out"
    with pytest.raises(remat.BudgetError, match=said) as caught:
        remat.optimize(model, (x,), budget=1000, plan=big)
    error = caught.value
    assert (error.budget_bytes, error.minimum_bytes) == (1000, big.peak_bytes)
    assert error.where
    assert remat.plan(model, (x,), budget=big.peak_bytes, plan=big).dropped == big.dropped


def test_a_budget_that_is_no_bound_takes_any_plan() -> None:
    model, x = mlp()
    tight = remat.plan(model, (x,), budget=0.6)
    again = remat.plan(model, (x,), budget=None, plan=tight)
    assert again == dataclasses.replace(tight, budget_bytes=None)


def test_a_plan_for_another_dtype_is_refused() -> None:
    model, x = mlp()
    half = remat.plan(mlp()[0].bfloat16(), (x.bfloat16(),), budget=None)
    with pytest.raises(remat.RematError, match="bytes of parameters"):
        remat.optimize(model, (x,), budget=half.peak_bytes, plan=half)


def test_a_plan_for_a_range_is_simulated_in_the_dtype_at_hand() -> None:
    half, x = mlp(dropout=0.0)  # which is other ops in half precision
    plan = remat.plan(half.bfloat16(), (x.bfloat16(),), budget=0.7, dynamic_shapes={"x": {0: "rows"}})
    model, x = mlp(dropout=0.0)
    found = remat.plan(model, (x,), budget=None, plan=plan)
    assert found.dropped == plan.dropped
    assert found.peak_bytes > 1.5 * plan.peak_bytes


def _accumulated(module: nn.Module, batches: list[torch.Tensor]) -> list[int]:
    """Peaks of steps that add to each other's gradients."""
    module.zero_grad()
    return [remat.measure(lambda x=x: module(x).backward()).peak_bytes for x in batches]


@pytest.mark.parametrize("dynamic_shapes", [None, {"x": {0: "rows"}}])
def test_gradients_that_are_there_count_against_a_plan_given(dynamic_shapes: Any) -> None:
    model, x = mlp(dropout=0.0)
    budget = 415 * 2**10  # the smallest plan that adds to gradients needs 404 KiB
    plan = remat.plan(model, (x,), budget=budget, dynamic_shapes=dynamic_shapes)
    module = remat.optimize(model, budget=budget, plan=plan)
    assert max(_accumulated(module, [x, x])) <= budget
    assert module.plan is not None
    assert module.plan.dropped != plan.dropped


def test_a_plan_for_a_range_serves_other_sizes_while_gradients_accumulate() -> None:
    model, x = mlp(dropout=0.0)
    plan = remat.plan(model, (x,), budget=0.7, dynamic_shapes={"x": {0: "rows"}})
    module = remat.optimize(model, budget=None, plan=plan)
    for rows in (64, 48, 32):
        module(torch.randn(rows, 32)).backward()
        assert module.plan is not None
        assert module.plan.dropped == plan.dropped


def test_a_path_is_no_plan() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match=r"plan='plan.json' is no plan; .*remat.Plan.from_json"):
        remat.optimize(model, (x,), budget=None, plan="plan.json")  # type: ignore[arg-type]
