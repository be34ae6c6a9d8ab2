"""Steps whose peak is the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import remat
from remat import whole
from remat.loss import cross_entropy
from tests.steps import assert_same, run_step


def wide(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    """A small Llama with a large vocabulary."""
    torch.manual_seed(0)
    shape = {"vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 192}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False)).to(dtype)
    ids = torch.randint(0, 8192, (2, 128))
    return model.train(), {"input_ids": ids, "labels": ids}


def shares(plan: remat.Plan | None) -> bool:
    assert plan is not None
    return any("remat.cross_entropy" in moment.name for moment in plan.timeline)


@pytest.mark.slow
def test_where_a_plan_given_needs_too_much_the_loss_may_be_shared() -> None:
    model, kwargs = wide()
    plan = remat.plan(model, (), kwargs, budget=None, dynamic_shapes={key: {0: "batch"} for key in kwargs})
    least = remat.frontier(model, (), kwargs, points=2)[-1]
    found = remat.plan(model, (), kwargs, budget=least.peak_bytes, plan=plan)
    assert shares(found)
    above = 1.05 * (least.peak_bytes - least.resident_bytes)
    share = above / (least.baseline_peak_bytes - least.resident_bytes)  # of the step before its loss was shared
    tight = remat.plan(model, (), kwargs, budget=share)
    assert shares(tight)
    assert remat.plan(model, (), kwargs, budget=share, plan=tight) == tight


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_gradients_are_the_same_and_the_peak_is_lower_than_without(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kwargs = wide(dtype)
    plain = remat.optimize(model, (), kwargs, budget=None)
    assert not shares(plain.plan)
    expected = run_step(plain, kwargs)
    assert plain.plan is not None
    with pytest.raises(remat.BudgetError) as error:
        remat.plan(model, (), kwargs, budget=1)
    assert error.value.minimum_bytes is not None
    budget = error.value.minimum_bytes * 21 // 20
    with monkeypatch.context() as patch:
        patch.setattr(whole, "find_losses", lambda graph: [])  # as if there were none
        with pytest.raises(remat.BudgetError):
            remat.plan(model, (), kwargs, budget=budget)
    module = remat.optimize(model, (), kwargs, budget=budget)
    assert shares(module.plan)
    outcome = run_step(module, kwargs)
    assert_same(outcome, expected)
    assert module.plan is not None
    assert outcome.peak_bytes <= module.plan.peak_bytes <= budget


@pytest.mark.slow
def test_the_smallest_budget_named_is_enough_where_the_loss_is_little() -> None:
    """Shares are not worth a second plan then, and still need a little less than the step as it is written."""
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.ElectraForMaskedLM(transformers.ElectraConfig(**shape, intermediate_size=128)).train()
    ids = torch.randint(5, 94, (3, 40))
    inputs = {"input_ids": ids, "labels": ids}
    with pytest.raises(remat.BudgetError) as error:
        remat.plan(model, (), inputs, budget=1)
    assert error.value.minimum_bytes is not None
    assert shares(remat.plan(model, (), inputs, budget=error.value.minimum_bytes))


def test_of_two_shortages_the_one_that_names_a_budget_is_told() -> None:
    unknown, most, least = (remat.BudgetError("", minimum_bytes=n) for n in (None, 7, 5))
    host = remat.HostBudgetError("", minimum_bytes=1)
    assert sorted([host, unknown, most, least], key=whole._shortage) == [least, most, unknown, host]


@pytest.mark.slow
def test_the_frontier_fit_and_formulas_know_of_it() -> None:
    model, kwargs = wide()
    plans = remat.frontier(model, (), kwargs, points=4)
    peaks, times = [p.peak_bytes for p in plans], [p.step_us for p in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert times == sorted(times)
    assert not shares(plans[0])
    assert shares(plans[-1])
    found = remat.fit(model, (), kwargs, budget=plans[0].peak_bytes)
    assert found.size > 2
    assert shares(found.plan)
    axes = {key: {0: "batch"} for key in kwargs}
    plan = remat.plan(model, (), kwargs, budget=plans[-1].peak_bytes, dynamic_shapes=axes)
    assert plan.peak_bytes_at(batch=2) == pytest.approx(plans[-1].peak_bytes, rel=1e-3)
    module = remat.optimize(model, (), kwargs, budget=None, plan=remat.Plan.from_json(plan.to_json()))
    assert shares(module.plan)
    assert_same(run_step(module, kwargs), run_step(remat.optimize(model, (), kwargs, budget=None), kwargs))


@pytest.mark.parametrize("ignored", [-100, 0, 3])
@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("rows", [5, 40])
def test_an_ignored_class_may_have_any_number(ignored: int, reduction: int, rows: int) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(40, 7, requires_grad=True), torch.randint(0, 7, (40,))
    target[:rows] = ignored
    expected = nn.functional.cross_entropy(logits, target, ignore_index=ignored, reduction=("none", "mean", "sum")[reduction])
    found, _ = cross_entropy(logits, target, torch.float32, False, reduction, ignored)
    assert torch.equal(found, expected) or (found.isnan() and expected.isnan())
    (ours,), (theirs,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


class Pairs(nn.Module):
    """Two losses over the same logits, one of them turned round, and a penalty on the gradient for the step to add."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scale = nn.Linear(16, 16), nn.Linear(16, 16), nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.first(x) @ self.second(x).T * self.scale.exp()
        which = torch.arange(len(x))
        return F.cross_entropy(logits, which) + F.cross_entropy(logits.T, which)


def test_logits_that_are_turned_round_and_gradients_of_the_gradient() -> None:
    model, x = Pairs(), torch.randn(256, 16)
    with pytest.raises(remat.BudgetError) as caught:
        remat.plan(model, (x,), budget=1)
    ours = remat.optimize(model, (x,), budget=caught.value.minimum_bytes)
    assert shares(ours.plan)

    def gradients(step: nn.Module, create_graph: bool) -> list[torch.Tensor]:
        loss, parameters = step(x), list(model.parameters())
        found = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return list(torch.autograd.grad(loss + sum(g.square().sum() for g in found), parameters) if create_graph else found)

    for gradient, expected in zip(gradients(ours, False), gradients(model, False), strict=True):
        assert torch.equal(gradient, expected)
    for gradient, expected in zip(gradients(ours, True), gradients(model, True), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_share_is_of_the_same_step_where_that_adds_to_gradients() -> None:
    """Not of the one with its loss in shares, which has been captured meanwhile."""
    model, kwargs = wide()
    optimized = remat.optimize(model, (), kwargs, budget=0.7)
    above = []
    for _ in range(2):
        optimized(**kwargs).loss.backward()
        plan = optimized.plan
        assert plan is not None
        assert plan.budget_bytes is not None
        assert shares(plan)
        fresh = remat.plan(copy.deepcopy(model), (), kwargs, budget=0.7)  # without gradients
        assert fresh.budget_bytes is not None
        above.append((plan.budget_bytes - plan.resident_bytes) / (fresh.budget_bytes - fresh.resident_bytes))
    assert above == [1.0, pytest.approx(1.0, abs=0.1)]
