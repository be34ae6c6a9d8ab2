"""Steps beside their plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat.views import charts
from tests.models import build, llama
from tests.views.cases import data_of


def module() -> tuple[Any, dict[str, Any]]:
    model, kwargs = llama(layers=3)
    return remat.optimize(model.train(), (), kwargs, budget=0.5), kwargs


def test_a_module_is_held_against_its_own_plan() -> None:
    optimized, kwargs = module()
    found = remat.verify(optimized, kwargs=kwargs)
    assert found.holds
    assert found.peak_bytes == next(check for check in found.checks if check.name == "peak").measured_bytes
    assert [check.name for check in found.checks if abs(check.error) > 0.01] == []
    held: list[Any] = []

    def step() -> None:
        held.append(optimized(**kwargs))
        held[0].loss.backward()

    assert found.peak_bytes == pytest.approx(remat.measure(step).peak_bytes, rel=1e-3)
    assert "the measured peak is within the prediction" in str(found)
    assert str(found).count("iB") == 2 * len(found.checks)


def test_the_plan_is_that_of_the_step() -> None:
    """Not that of the step before, of another size; nor need there be one before."""
    model = remat.optimize(
        nn.Sequential(*(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(3))), budget=None
    )
    for rows in (256, 64, 256):
        found = remat.verify(model, args=(torch.randn(rows, 32),))
        assert found.holds
        assert abs(found.checks[-1].error) < 0.02


def test_a_step_of_ones_own() -> None:
    optimized, kwargs = module()
    assert remat.verify(lambda: optimized(**kwargs).loss.backward(), optimized.plan).holds


@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_model() -> None:
    model, kwargs = build("llama")
    compiled = torch.compile(model, backend="remat", options={"budget": 0.8, "compiler": "eager"})
    compiled(**kwargs)
    (graph,) = remat.plans(compiled)
    found = remat.verify(compiled, graph.plan, kwargs=kwargs)
    assert found.holds
    assert abs(found.checks[-1].error) < 0.02


@pytest.mark.parametrize("has_gradients", [False, True])
def test_gradients_are_as_they_were(has_gradients: bool) -> None:
    model, kwargs = llama(layers=1)
    if has_gradients:
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
    model.unused = nn.Parameter(torch.zeros(2**16))  # trains, and never has one
    optimized = remat.optimize(model.train(), (), kwargs, budget=None)
    found = remat.verify(optimized, kwargs=kwargs)
    assert found.holds
    assert abs(found.checks[0].error) < 0.01
    assert model.unused.grad is None
    gradients = [p.grad for p in model.parameters()]
    assert all((g == 3.0).all() for g in gradients if g is not None) if has_gradients else set(gradients) == {None}


def test_a_wrong_prediction_shows() -> None:
    """A plan for a smaller batch, held against the step of a larger one."""
    optimized, kwargs = module()
    fewer = {name: value[:1] for name, value in kwargs.items()}
    plan = remat.plan(optimized._original, (), fewer, budget=None)
    found = remat.verify(lambda: optimized(**kwargs).loss.backward(), plan)
    assert not found.holds
    assert "the step took more than was predicted" in str(found)
    assert {check.name for check in found.checks if check.error < -0.2} >= {"kept for backward", "peak"}


def test_the_chart_has_both_timelines() -> None:
    optimized, kwargs = module()
    found = remat.verify(optimized, kwargs=kwargs)
    rows = [row for data in data_of(found.chart().to_dict()) for row in data if "what" in str(row)]
    for name, peak in (("predicted", found.plan.peak_bytes), ("measured", found.peak_bytes)):
        own = [row for row in rows if row["what"] == name]
        assert max(row["size"] for row in own) == pytest.approx(peak / 2**20, rel=1e-3)
        assert [row["at"] for row in own] == sorted(row["at"] for row in own)
        assert 0 <= own[0]["at"] <= own[-1]["at"] <= 2
    assert "<svg" in found._repr_html_()
    assert charts.svg(found.chart()).startswith("<svg")


def test_errors_are_shares_of_what_was_measured() -> None:
    assert remat.Check("a", 110, 100).error == pytest.approx(0.1)
    assert remat.Check("a", 0, 0).error == 0
    assert remat.Check("a", 1, 0).error == 1


def test_what_has_no_plan_is_refused() -> None:
    model, kwargs = llama(layers=1)
    with pytest.raises(remat.RematError, match="there is no plan"):
        remat.verify(model, kwargs=kwargs)
    with pytest.raises(remat.RematError, match="there is no plan"):
        remat.verify(lambda: model(**kwargs).loss.backward())


def test_what_has_no_backward_is_refused() -> None:
    optimized, kwargs = module()
    with pytest.raises(remat.RematError, match="no backward"):
        remat.verify(lambda: optimized(**kwargs), optimized.plan)
    with pytest.raises(remat.RematError, match="nothing that requires grad"):
        remat.verify(nn.Identity(), optimized.plan, (torch.zeros(2),))
    inputs: Any = (torch.zeros(2),)
    with pytest.raises(remat.RematError, match="not a tuple; inputs go into args= and kwargs="):
        remat.verify(optimized, inputs)


def test_a_verification_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        remat.Check("a", 1, 1).name = "b"  # type: ignore[misc]


class _Pair(nn.Module):
    """Returns its loss, and what that comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.layers(x)
        return found, (found - x).square().mean()


@pytest.mark.parametrize("holds", [True, False])
def test_backward_begins_where_it_is_planned_to(holds: bool) -> None:
    model = remat.optimize(_Pair(), budget=None, holds_outputs=holds)
    found = remat.verify(model, args=(torch.randn(256, 32),))
    assert found.plan.holds_outputs == holds
    assert [check.name for check in found.checks if not 0 <= check.predicted_bytes - check.measured_bytes < 8192] == []
