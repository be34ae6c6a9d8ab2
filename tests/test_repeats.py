"""Values that backward lets go of between two of their readers, to compute them once more."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat.alternatives import explain_value
from remat.menus import make_menus
from remat.planner import Solution
from remat.solvers.moves import repeatable
from remat.solvers.search import meant
from remat.whole import TracedModel, trace
from tests.models import build
from tests.steps import assert_same, run_step


def at_random(traced: TracedModel, seed: int) -> remat.Plan:
    """A plan that drops and repeats what may be, as it comes."""
    program, dice = traced.program, random.Random(seed)
    free = [p for p, op in enumerate(program.forward) if op.outputs and not any(program.values[v].pinned for v in op.outputs)]
    dropped = frozenset(p for p in free if dice.random() < 0.6)
    repeats = {p: dice.randint(1, 2) for p in sorted(repeatable(program)) if dice.random() < 0.4}
    regions = ((0, len(program.forward)),)
    found = meant(program, dropped, repeats, regions)
    solution = Solution(found.dropped, regions, found.replay, repeats=found.repeats)
    return traced.describe(make_menus(program), solution, None, 0.0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "t5", "mixtral"])
def test_any_repeats_change_nothing_and_peak_where_predicted(name: str, seed: int) -> None:
    model, kwargs = build(name)
    expected = run_step(model, kwargs)
    plan = at_random(trace(model, (), kwargs), seed)
    assert plan.repeats
    outcome = run_step(remat.optimize(model, (), kwargs, budget=None, plan=plan), kwargs)
    assert_same(outcome, expected)
    assert 0.99 * plan.peak_bytes <= outcome.peak_bytes <= plan.peak_bytes


class Tight(nn.Module):
    """A wide result that backward reads first and last, with something large in between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.tanh(self.inner(x))
        middle = self.outer(wide)
        large = torch.cat([middle.sigmoid()] * 6, dim=-1).exp()
        return (large.sum(dim=-1, keepdim=True) * wide).sum()


def tight() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Tight(), {"x": torch.randn(4096, 64)}


def test_the_smallest_budget_needs_repeats() -> None:
    model, kwargs = tight()
    expected = run_step(model, kwargs)
    smallest = remat.frontier(model, (), kwargs, points=2)[-1]
    assert smallest.repeats
    again = remat.Plan.from_json(smallest.to_json())
    assert again == smallest
    (wide,) = (a for block in again.blocks for a in block.activations if a.name == smallest.repeats[0][0])
    assert "until backward first reads it" in wide.reason
    ways = {way.decision: way for way in explain_value(again, wide.name).alternatives}
    assert remat.Decision.RECOMPUTE in ways
    assert ways[remat.Decision.SAVE].is_chosen
    for plan in (None, again):
        module = remat.optimize(model, (), kwargs, budget=smallest.peak_bytes, plan=plan)
        assert module.plan.repeats == smallest.repeats
        outcome = run_step(module, kwargs)
        assert_same(outcome, expected)
        assert outcome.peak_bytes <= smallest.peak_bytes


def test_a_retained_graph_gives_the_same_each_time() -> None:
    model, kwargs = tight()
    plan = remat.frontier(model, (), kwargs, points=2)[-1]
    module = remat.optimize(model, (), kwargs, budget=None, plan=plan)
    gradients = []
    loss = module(**kwargs)
    for _ in range(3):
        gradients.append(torch.autograd.grad(loss, [*module.parameters()], retain_graph=True))
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))
    expected = torch.autograd.grad(model(**kwargs), [*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], expected, strict=True))


def test_what_repeats_refuses_tensors_changed_in_between() -> None:
    model, kwargs = tight()
    plan = remat.frontier(model, (), kwargs, points=2)[-1]
    module = remat.optimize(model, (), kwargs, budget=None, plan=plan)
    loss = module(**kwargs)
    kwargs["x"].mul_(2)
    with pytest.raises(remat.RewriteError, match="modified in place"):
        loss.backward()


def test_compiled_graphs_compute_again_what_repeats() -> None:
    model, kwargs = tight()
    expected = run_step(model, kwargs)
    with pytest.raises(remat.BudgetError) as error:
        torch.compile(model, backend="remat", options={"budget": 1, "compiler": "eager"})(**kwargs)
    torch._dynamo.reset()
    budget = error.value.minimum_bytes
    module = torch.compile(model, backend="remat", options={"budget": budget, "compiler": "eager"})
    outcome = run_step(module, kwargs)
    (graph,) = remat.plans(module)
    targets = [node.target for node in graph.backward.graph.nodes]
    assert dict(graph.plan.repeats)["tanh"] == 1
    assert targets.count(torch.ops.aten.tanh.default) == 2
    assert_same(outcome, expected)
    assert 0.97 * budget <= outcome.peak_bytes <= budget
