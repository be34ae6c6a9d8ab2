"""Door 1 on every model: gradients, random state and memory of the rewritten step, at budgets from large to smallest."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

import remat
from tests.models import MODELS, build
from tests.steps import Outcome, assert_close_gradients, assert_same, run_step


@dataclass(frozen=True)
class Reference:
    """The original module, the captured graph without remat, and the trade-off."""

    original: Outcome
    captured: Outcome
    unconstrained: remat.Plan
    smallest_bytes: int


@functools.cache
def reference(name: str) -> Reference:
    model, kwargs = build(name)
    original = run_step(model, kwargs)
    model, kwargs = build(name)
    captured = remat.optimize(model, (), kwargs, budget=None)
    outcome = run_step(captured, kwargs)
    assert captured.plan is not None
    return Reference(original, outcome, captured.plan, remat.frontier(model, (), kwargs)[-1].peak_bytes)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_budget_the_step_is_the_original(name: str) -> None:
    found = reference(name)
    assert found.captured.output_type is found.original.output_type
    assert_close_gradients(found.captured.gradients, found.original.gradients, 1e-5)
    assert torch.equal(found.captured.rng, found.original.rng)
    assert found.unconstrained.decisions
    assert set(found.unconstrained.decisions.values()) == {remat.Decision.SAVE}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["smallest", "middle", "95%"])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_holds_and_changes_nothing(name: str, share: float) -> None:
    found = reference(name)
    largest = 0.95 * found.unconstrained.peak_bytes
    budget = int(found.smallest_bytes + share * max(largest - found.smallest_bytes, 0))
    model, kwargs = build(name)
    module = remat.optimize(model, (), kwargs, budget=budget)
    outcome = run_step(module, kwargs)
    assert_same(outcome, found.captured)
    assert outcome.output_type is found.original.output_type
    assert module.plan is not None
    assert outcome.peak_bytes <= budget
    assert module.plan.peak_bytes <= budget
    tolerance = 0.04 if name == "encoder" else 0.03  # how long the output and its gradient live is up to the caller's loss
    assert abs(module.plan.peak_bytes / outcome.peak_bytes - 1) <= tolerance


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_a_smaller_budget_never_measures_a_higher_peak(name: str) -> None:
    model, kwargs = build(name)
    frontier = remat.frontier(model, (), kwargs, points=4)
    assert [p.peak_bytes for p in frontier] == sorted((p.peak_bytes for p in frontier), reverse=True)
    assert [p.step_us for p in frontier] == sorted(p.step_us for p in frontier)
    peaks = []
    for plan in frontier:
        model, kwargs = build(name)
        peaks.append(run_step(remat.optimize(model, (), kwargs, budget=None, plan=plan), kwargs).peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
