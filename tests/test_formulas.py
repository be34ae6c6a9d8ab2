"""Peaks and times as functions of the inputs' sizes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

import remat
from remat import record
from remat.formulas import grid, interpolated
from remat.shapes import named_axes, resized
from tests.models import Mlp, llama, mlp
from tests.steps import run_step


def test_the_peak_at_other_sizes_is_that_of_the_same_decisions_there() -> None:
    model, kwargs = llama(layers=1)
    model.train()
    shapes = {key: {0: "batch"} for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
    plan = remat.plan(model, (), kwargs, budget=0.8, dynamic_shapes=shapes)
    assert plan.peak_bytes_at(batch=4) == pytest.approx(plan.peak_bytes, rel=1e-3)
    assert plan.step_us_at(batch=4) == pytest.approx(plan.step_us, rel=1e-3)
    for batch in (3, 16):
        _, other = resized((), kwargs, named_axes(model, (), kwargs), {"batch": batch})
        module = remat.optimize(model, (), other, budget=None, plan=plan)
        assert module.plan is not None
        assert module.plan.decisions == plan.decisions
        measured = run_step(module, other).peak_bytes
        assert measured <= plan.peak_bytes_at(batch=batch) <= 1.02 * measured


def _same(plan: remat.Plan) -> Any:
    return lambda activation: plan.decisions.get(activation.name)


@pytest.mark.slow
def test_two_dimensions() -> None:
    model, x = mlp(rows=64)
    plan = remat.plan(Wide(model), (x.expand(8, 64, 32).clone(),), budget=0.7, dynamic_shapes=({0: "batch", 1: "seq"},))
    assert plan.peak_formula is not None
    batch, seq = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "seq"))
    assert plan.peak_formula.expression.free_symbols == {batch, seq}
    for sizes in ({"batch": 8, "seq": 64}, {"batch": 5, "seq": 200}):
        exact = plan.peak_formula.expression.subs({batch: sizes["batch"], seq: sizes["seq"]})
        assert plan.peak_bytes_at(**sizes) == sympy.ceiling(exact)
    there = remat.plan(Wide(model), (torch.randn(5, 200, 32),), budget=None, policy=_same(plan))
    assert plan.peak_bytes_at(batch=5, seq=200) == pytest.approx(there.peak_bytes, rel=0.01)
    assert remat.Plan.from_json(plan.to_json()) == plan


class Wide(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_formula_takes_the_largest_of_its_polynomials() -> None:
    numbers = {n: (3 * n + 100, n * n, 7) for n in grid(8)}
    formula = interpolated({(n,): row for n, row in numbers.items()}, ("n",))
    assert [formula({"n": n}) for n in (1, 8, 50)] == [103, 124, 2500]
    n = sympy.Symbol("n", integer=True, positive=True)
    assert formula.expression == sympy.Max(n**2, 3 * n + 100)


def test_scratch_memory_that_grows_in_steps_counts_with_the_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "workspace_bytes", lambda call: 40_000 if call and call.largest_bytes > 4 * 40 * 128 else 0)
    model, x = mlp(rows=64)
    plan = remat.plan(model, (x,), budget=0.7, dynamic_shapes={"x": {0: "rows"}})
    assert plan.peak_bytes_at(rows=64) == pytest.approx(plan.peak_bytes, rel=1e-3)
    for rows in (16, 32):
        there = remat.plan(model, (torch.randn(rows, 32),), budget=None, policy=_same(plan))
        assert there.peak_bytes <= plan.peak_bytes_at(rows=rows) <= there.peak_bytes + 40_000


def test_grids_stay_below_where_they_can() -> None:
    assert (grid(1), grid(6), grid(8), grid(512)) == ((2, 4, 6), (6, 12, 18), (2, 4, 8), (128, 256, 512))


def test_one_plan_serves_a_range_of_sizes_and_another_is_made_beyond() -> None:
    model, x = mlp(rows=64)
    plan = remat.plan(model, (x,), budget=0.7, dynamic_shapes={"x": {0: "rows"}})
    module = remat.optimize(model, budget=plan.peak_bytes_at(rows=128), plan=plan)
    for rows, served in ((64, True), (128, True), (160, False)):
        module(torch.randn(rows, 32))
        assert module.plan is not None
        assert (module.plan.dropped == plan.dropped) is served
        assert module.plan.peak_bytes <= plan.peak_bytes_at(rows=128)


class Branches(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.tanh() if x.shape[0] > 20 else x)


def test_bad_input() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match="this plan is for one size"):
        remat.plan(model, (x,), budget=None).peak_bytes_at(batch=3)
    plan = remat.plan(model, (x,), budget=None, dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    with pytest.raises(remat.RematError, match="sizes are needed for rows; given were batch"):
        plan.peak_bytes_at(batch=3)
    wrong: list[Any] = [0, 1.5, "8"]
    for rows in wrong:
        with pytest.raises(remat.RematError, match=f"rows={rows!r} must be a whole number, at least 1"):
            plan.step_us_at(rows=rows)
    with pytest.raises(remat.RematError, match="names no axis"):
        remat.plan(model, (x,), budget=None, dynamic_shapes={"x": None})
    for said in ("nonsense", {"x": "rows"}, 3):
        for ask in (remat.plan, remat.optimize):
            with pytest.raises(remat.RematError, match="says nothing of axes"):
                ask(model, (x,), budget=None, dynamic_shapes=said)
    for ask in (remat.plan, remat.optimize):
        with pytest.raises(remat.RematError, match="names 'y'; this call has the arguments x"):
            ask(model, (x,), budget=None, dynamic_shapes={"y": {0: "rows"}})
        with pytest.raises(remat.RematError, match="names axis 2 of x, of shape 64x32"):
            ask(model, (x,), budget=None, dynamic_shapes={"x": {2: "rows"}})
    later = remat.optimize(model, budget=None, dynamic_shapes={"y": {0: "rows"}})
    with pytest.raises(remat.RematError, match="names 'y'"):
        later(x)
    with pytest.raises(remat.RematError, match="at rows=16 the model runs other ops"):
        remat.plan(Branches().train(), (x,), budget=None, dynamic_shapes={"x": {0: "rows"}})
    pair = (torch.randn(4, 32), torch.randn(8, 32))
    with pytest.raises(remat.RematError, match="different lengths"):
        remat.plan(Both().train(), pair, budget=None, dynamic_shapes={"x": {0: "rows"}, "y": {0: "rows"}})


class Both(Mlp):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + super().forward(y)
