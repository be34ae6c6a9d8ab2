"""Compiled steps whose inputs change size: each has a plan of its own, and Dynamo never runs one without."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat import each_size
from tests.models import Mlp
from tests.steps import assert_close_gradients, assert_same, refused, run_step

pytestmark = pytest.mark.usefixtures("_dynamo")

BUDGET = 700_000


class Annealed(nn.Module):
    """Numbers that change from step to step, of a loss and of activations, and one that Dynamo takes for such."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.weight, self.over = Mlp(), 1.0, 1.0, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x * self.scale) * self.weight + (x / self.scale).mean() + (self.over / x.exp()).mean()


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> Any:
    options = {"budget": BUDGET, "compiler": "eager", **options}
    return torch.compile(model, backend="remat", options=options, dynamic=dynamic)


@pytest.mark.parametrize(
    "way", [pytest.param("dynamic", marks=pytest.mark.slow), pytest.param("marked", marks=pytest.mark.slow), "found out"]
)
def test_more_sizes_than_dynamo_compiles(way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each_size, "OFTEN", 3)
    plain = Mlp()
    module = compiled(copy.deepcopy(plain), True if way == "dynamic" else None)
    sizes = range(150, 155)
    with caplog.at_level(logging.WARNING, "remat"), torch._dynamo.config.patch(recompile_limit=3):
        for size in (*sizes, 150):
            x = torch.randn(size, 32)
            if way == "marked":
                torch._dynamo.mark_dynamic(x, 0)
            expected, outcome = run_step(plain, {"x": x}), run_step(module, {"x": x})
            assert_same(outcome, expected)
            assert outcome.peak_bytes <= BUDGET < expected.peak_bytes
    again = way == "found out"  # the first size came before Dynamo knew that it changes
    assert len(remat.plans(module)) == len(sizes) + again
    assert caplog.text.count("3 sizes of inputs have been planned") == 1


@pytest.mark.slow
def test_numbers_that_change_too() -> None:
    """Those of arithmetic need no code of their own."""
    plain = Annealed()
    module = compiled(model := copy.deepcopy(plain))
    for step, size in enumerate((50, 60, 60, 50)):
        model.scale = plain.scale = 1 + 0.1 * step
        model.weight = plain.weight = 1 - 0.01 * step
        x = torch.randn(size, 32)
        assert_same(run_step(module, {"x": x}), run_step(plain, {"x": x}))
    assert len(remat.plans(module)) <= 4
    for number in (0.3, 0.4):  # these do
        model.body.dropout.p = plain.body.dropout.p = model.over = plain.over = number
        assert_same(run_step(module, {"x": x}), run_step(plain, {"x": x}))


def test_a_size_that_does_not_fit() -> None:
    module = compiled(Mlp(), True)
    run_step(module, {"x": torch.randn(64, 32)})
    error = refused(module, x=torch.randn(2000, 32))
    assert isinstance(error, remat.BudgetError)
    assert error.minimum_bytes is not None
    torch._dynamo.reset()
    outcome = run_step(compiled(Mlp(), True, budget=error.minimum_bytes), {"x": torch.randn(2000, 32)})
    assert outcome.peak_bytes <= error.minimum_bytes


def test_between_graph_breaks_and_without_grad() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(x).tanh()
            torch._dynamo.graph_break()
            return self.first(x)

    plain = Broken()
    module = compiled(copy.deepcopy(plain), True, budget=2 * BUDGET)
    for size in (150, 200, 180):
        x = torch.randn(size, 32)
        assert_same(run_step(module, {"x": x}), run_step(plain, {"x": x}))
    planned = len(remat.plans(module))
    assert planned == 6
    with torch.no_grad():
        assert module(torch.randn(77, 32)).dim() == 0
    assert len(remat.plans(module)) == planned


@pytest.mark.slow
def test_the_latest_sizes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(each_size, "KEPT", 2)
    module = compiled(Mlp(), True)
    for size in (10, 20, 30, 10):
        run_step(module, {"x": torch.randn(size, 32)})
    assert len(remat.plans(module)) == 2


@pytest.mark.slow
def test_with_inductor() -> None:
    plain = Mlp(dropout=0.0)
    module = compiled(copy.deepcopy(plain), True, compiler="inductor")
    for size in (150, 170):
        x = torch.randn(size, 32)
        expected, outcome = run_step(plain, {"x": x}), run_step(module, {"x": x})
        assert_close_gradients(outcome.gradients, expected.gradients, 1e-5)
        assert outcome.peak_bytes <= BUDGET < expected.peak_bytes
    assert len(remat.plans(module)) == 2
