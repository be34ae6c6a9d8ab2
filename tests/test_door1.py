"""Door 1 on every model: gradients, random state and memory of the rewritten step, at budgets from large to smallest."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

import remat
from remat.module import RematModule
from remat.settings import Settings
from remat.whole import Rewriting, TracedModel, trace
from tests.models import EACH_MODEL, build
from tests.steps import Outcome, assert_close_gradients, assert_same, run_step

SHARES = {"smallest": 0.0, "middle": 0.5, "95%": 1.0}


@dataclass(frozen=True)
class Reference:
    """The original module, the captured graph without remat, and the trade-off."""

    original: Outcome
    captured: Outcome
    unconstrained: remat.Plan
    frontier: tuple[remat.Plan, ...]

    def budget(self, share: float) -> int:
        """From the smallest that works to 95% of the unconstrained peak."""
        smallest, largest = self.frontier[-1].peak_bytes, 0.95 * self.unconstrained.peak_bytes
        return int(smallest + share * max(largest - smallest, 0))


@functools.cache
def traced(name: str) -> TracedModel:
    """Once for all budgets: capturing takes longest."""
    model, kwargs = build(name)
    return trace(model, (), kwargs)


@functools.cache
def reference(name: str) -> Reference:
    model, kwargs = build(name)
    original = run_step(model, kwargs)
    model, kwargs = build(name)
    captured = remat.optimize(model, (), kwargs, budget=None)
    outcome = run_step(captured, kwargs)
    assert captured.plan is not None
    return Reference(original, outcome, captured.plan, tuple(traced(name).frontier(Settings(None), points=5)))


@functools.cache
def within_budget(name: str, share: float) -> tuple[remat.Plan, Outcome]:
    model, kwargs = build(name)
    plan_for = Rewriting(Settings(reference(name).budget(share)))
    module = RematModule(model, lambda *call: plan_for(*call[:3], traced(name).captured))
    outcome = run_step(module, kwargs)
    assert module.plan is not None
    return module.plan, outcome


@pytest.mark.parametrize("name", EACH_MODEL)
def test_without_a_budget_the_step_is_the_original(name: str) -> None:
    found = reference(name)
    assert found.captured.output_type is found.original.output_type
    assert_close_gradients(found.captured.gradients, found.original.gradients, 1e-5)
    assert torch.equal(found.captured.rng, found.original.rng)
    assert found.unconstrained.decisions
    assert set(found.unconstrained.decisions.values()) == {remat.Decision.SAVE}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("name", EACH_MODEL)
def test_a_budget_holds_and_changes_nothing(name: str, share: float) -> None:
    budget = reference(name).budget(share)
    plan, outcome = within_budget(name, share)
    assert_same(outcome, reference(name).captured)
    assert outcome.output_type is reference(name).original.output_type
    assert outcome.peak_bytes <= budget
    assert plan.peak_bytes <= budget
    assert plan.budget_bytes == budget
    assert abs(plan.peak_bytes / outcome.peak_bytes - 1) <= 0.01


@pytest.mark.parametrize("name", EACH_MODEL)
def test_a_smaller_budget_never_measures_a_higher_peak(name: str) -> None:
    peaks = [within_budget(name, share)[1].peak_bytes for share in SHARES.values()]
    assert sorted(peaks) == peaks
    assert peaks[-1] <= reference(name).captured.peak_bytes


@pytest.mark.parametrize("name", EACH_MODEL)
def test_along_the_frontier_peaks_shrink_and_steps_grow(name: str) -> None:
    frontier = reference(name).frontier
    assert frontier[0].peak_bytes == reference(name).unconstrained.peak_bytes
    assert [p.peak_bytes for p in frontier] == sorted({p.peak_bytes for p in frontier}, reverse=True)
    assert [p.step_us for p in frontier] == sorted(p.step_us for p in frontier)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "qwen3", "t5", "mixtral", "lora"])
def test_the_smallest_plan_is_below_checkpointing_each_block(name: str) -> None:
    model, kwargs = build(name)
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if name == "lora":
        model.enable_input_require_grads()  # type: ignore[operator]
    assert reference(name).frontier[-1].peak_bytes <= run_step(model, kwargs).peak_bytes


class Scaled(torch.nn.Module):
    """Makes a tensor of a number in each call, as attention masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).masked_fill(x > 0, torch.tensor(0.5)) * torch.tensor([2.0])


def test_constants_made_in_submodules_are_captured() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Sequential(Scaled(), Scaled()), Scaled()).train(), torch.randn(4, 8)
    module = remat.optimize(model, (x,), budget=None)
    expected, found = model(x), module(x)
    assert torch.equal(expected, found)
    gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (expected, found)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Target(torch.nn.Module):
    """Trains towards what it says itself without grad."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.nn.functional.gelu(self.second(h))
        with torch.no_grad():
            target = self.second(h).softmax(-1)
        return ((h - target) * target.exp()).square().mean()


def test_what_runs_without_grad_is_not_kept() -> None:
    torch.manual_seed(0)
    model, x = Target().train(), torch.randn(512, 32)
    budget = remat.frontier(model, (x,), points=2)[-1].peak_bytes
    module = remat.optimize(model, (x,), budget=budget)
    assert module.plan.dropped
    outcome = run_step(module, {"x": x})
    assert outcome.peak_bytes <= budget
    assert_same(outcome, run_step(model, {"x": x}))


class Encoded(torch.nn.Module):
    """A part of it runs without grad, though its parameters train: they are read with grad too where it is `shared`."""

    def __init__(self, shared: bool, lowered: bool = False) -> None:
        super().__init__()
        self.lowered = lowered
        blocks = (torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.LayerNorm(32)) for _ in range(6))
        self.encoder, self.decoder, self.shared = torch.nn.Sequential(*blocks), torch.nn.Linear(32, 32), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, self.lowered), torch.no_grad():
            known = self.encoder(x).to(x.dtype)
        y = self.encoder(x + 1) if self.shared else known
        return (torch.tanh(self.decoder(y)) - known).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "lowered"), [(False, False), (True, False), (False, True)])
def test_autograd_keeps_nothing_where_trained_parameters_are_read_without_grad(shared: bool, lowered: bool) -> None:
    torch.manual_seed(0)
    model, x = Encoded(shared, lowered).train(), torch.randn(512, 32)
    for budget in (2**30, remat.frontier(model, (x,), points=2)[-1].peak_bytes):
        module = remat.optimize(model, (x,), budget=budget)
        outcome = run_step(module, {"x": x})
        assert module.plan is not None
        assert outcome.peak_bytes <= module.plan.peak_bytes
        assert_same(outcome, run_step(model, {"x": x}))
    twice = [_second_gradients(step, model, x) for step in (model, module)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def _second_gradients(step: torch.nn.Module, model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = list(model.parameters())
    first = torch.autograd.grad(step(x), weights, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), weights, materialize_grads=True)
