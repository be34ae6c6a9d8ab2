"""The largest size that fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import remat
from remat.shapes import named_axes, resized
from remat.solvers.largest import largest
from tests.models import Mlp, build, llama, mlp
from tests.steps import run_step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet"])
def test_the_batch_runs_in_the_budget_and_the_next_one_up_does_not(name: str) -> None:
    model, kwargs = build(name)
    budget = 2 * remat.plan(model, (), kwargs, budget=None).peak_bytes
    found = remat.fit(model, (), kwargs, budget=budget)
    axes = named_axes(model, (), kwargs)
    _, grown = resized((), kwargs, axes, {"batch": found.size})
    module = remat.optimize(model, (), grown, budget=budget)
    assert run_step(module, grown).peak_bytes <= found.plan.peak_bytes <= budget
    assert module.plan is not None
    assert module.plan.decisions == found.plan.decisions
    assert (found.next_size, found.budget_bytes) == (found.size + 1, budget)
    with pytest.raises(remat.BudgetError) as refused:
        remat.optimize(model, (), resized((), kwargs, axes, {"batch": found.next_size})[1], budget=budget)
    assert refused.value.minimum_bytes == found.next_bytes
    assert str(found.size) in str(found)


@pytest.mark.slow
def test_the_longest_sequence_in_steps_and_for_a_device_that_is_not_there() -> None:
    model, kwargs = llama(layers=1)
    found = remat.fit(model.train(), (), kwargs, budget="80MiB", dim="seq", multiple_of=64, device="h100")
    assert found.size % 64 == 0
    assert found.next_size == found.size + 64
    assert found.plan.device == "h100"
    assert found.next_bytes is not None
    assert found.plan.peak_bytes <= 80 * 2**20 < found.next_bytes


@pytest.mark.slow
def test_a_named_axis() -> None:
    model, x = mlp(rows=64)
    shapes = {"x": {0: torch.export.Dim("rows")}}
    found = remat.fit(model, (x,), budget=2**20, dim="rows", dynamic_shapes=shapes)
    assert remat.fit(model, (x,), budget=2**20).size == found.size
    assert found.tried[found.size] <= 2**20 < found.tried[found.size + 1]


def test_smaller_than_the_example() -> None:
    model, x = mlp(rows=4096)
    budget = 2**21
    found = remat.fit(model, (x,), budget=budget)
    assert found.size < 4096
    assert remat.optimize(model, (torch.randn(found.size, 32),), budget=budget)(torch.randn(found.size, 32)).dim() == 0


@pytest.mark.parametrize(
    "needs", [lambda n: 1000 + 7 * n, lambda n: 1000 + 7 * n + n * n // 50, lambda n: 5000 + 7 * n + n % 3]
)
def test_far_sizes_are_found_in_few_trials(needs: Callable[[int], int]) -> None:
    tried: dict[int, int] = {}

    def room(units: int) -> int:
        tried[units] = 10**6 - needs(units)
        return tried[units]

    low, high, limit = largest(room, 4, "batch")
    assert (high, limit) == (low + 1, "")
    assert tried[low] >= 0 > tried[high]
    assert len(tried) <= 11


class Bounded(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 100:
            raise ValueError("at most 100 rows")
        return super().forward(x)


def test_a_model_that_takes_no_more() -> None:
    found = remat.fit(Bounded().train(), (torch.randn(40, 32),), budget="1GiB")
    assert (found.size, found.next_size, found.next_bytes) == (100, 101, None)
    assert "at most 100 rows" in found.limit
    assert "at most 100 rows" in str(found)


def test_sizes_that_a_dim_allows() -> None:
    model, x = mlp(rows=8)
    shapes = {"x": {0: torch.export.Dim("rows", min=4, max=50)}}
    found = remat.fit(model, (x,), budget="1GiB", dim="rows", dynamic_shapes=shapes, multiple_of=3)
    assert (found.size, found.next_size, found.next_bytes) == (48, 51, None)
    assert "rows is at most 50" in str(found)
    with pytest.raises(remat.BudgetError, match="no plan fits in 1000 B: rows 6 needs"):
        remat.fit(model, (x,), budget=1000, dim="rows", dynamic_shapes=shapes, multiple_of=3)
    for more in ({"max": 5}, {"min": 2, "max": 5}):
        shapes = {"x": {0: torch.export.Dim("rows", **more)}}
        assert remat.fit(model, (x,), budget="1GiB", dim="rows", dynamic_shapes=shapes).size == 5
    needs = remat.plan(model, (x[:4],), budget=None, policy="none").peak_bytes
    shapes = {"x": {0: torch.export.Dim("rows", min=6)}}
    with pytest.raises(remat.BudgetError, match="rows 6 with"):
        remat.fit(model, (x,), budget=needs, policy="none", dim="rows", dynamic_shapes=shapes)


class Normed(Mlp):
    """Runs with two rows or more, and an even number of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] < 3:
            raise ValueError("too few rows")
        if x.shape[0] % 2:
            raise ValueError("rows are pairs")
        return super().forward(x)


def test_a_model_that_takes_no_small_sizes_or_only_some() -> None:
    model, x = Normed().train(), torch.randn(16, 32)
    with pytest.raises(remat.BudgetError, match="no plan fits in 1000 B: batch 4 needs") as caught:
        remat.fit(model, (x,), budget=1000, multiple_of=2)
    assert caught.value.minimum_bytes is not None
    assert remat.fit(model, (x,), budget=caught.value.minimum_bytes, multiple_of=2).size == 4
    budget = remat.plan(model, (x,), budget=None).peak_bytes
    with pytest.raises(remat.RematError, match="and not at 17: rows are pairs Say which sizes are to be tried"):
        remat.fit(model, (x,), budget=budget)
    assert remat.fit(model, (x,), budget=budget, multiple_of=2).size >= 16


class Counted(nn.Module):
    """With a row of a table for each of up to 12 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layers = nn.Embedding(12, 32), Mlp(layers=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x + self.positions(torch.arange(x.shape[1], device=x.device) + 2))


def test_a_model_whose_positions_end() -> None:
    found = remat.fit(Counted().train(), (torch.randn(2, 4, 32),), budget="1GiB", dim="seq")
    assert (found.size, found.next_bytes) == (10, None)
    assert found.limit == "the input is too long: positions has 12 rows, and is asked for row 12"
    with pytest.raises(remat.CaptureError, match="too long"):
        remat.plan(Counted().train(), (torch.randn(2, 11, 32),), budget=None, device="h100")


class Constant(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight.exp() * x.shape[0]).sum()


@pytest.mark.parametrize("policy", ["auto", "none", "blocks"])
def test_not_even_the_smallest_size_fits(policy: str) -> None:
    model, x = mlp(rows=8)
    with pytest.raises(remat.BudgetError, match="no plan fits in 1000 B: batch 2") as caught:
        remat.fit(model, (x,), budget=1000, policy=policy, multiple_of=2)
    assert caught.value.budget_bytes == 1000
    least = caught.value.minimum_bytes
    assert least is not None
    assert remat.fit(model, (x,), budget=least, policy=policy, multiple_of=2).size == 2


class Masked(Mlp):
    """Attention of a kind, with a mask that is as long as the input in two axes."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scores = (x @ x.mT).unsqueeze(1) + mask
        return super().forward(scores.softmax(-1).squeeze(1) @ x)


def test_an_axis_that_was_left_out_is_no_limit() -> None:
    model, inputs = Masked(layers=1).train(), (torch.randn(2, 8, 32), torch.zeros(2, 1, 8, 8))
    least = remat.frontier(model, inputs, points=2)[-1].peak_bytes
    for budget in (least - 1, 2 * least):
        with pytest.raises(remat.RematError, match=r"runs at seq 8, the example's, and at no other: .*dynamic_shapes="):
            remat.fit(model, inputs, budget=budget, dim="seq")
    shapes = {"x": {1: "seq"}, "mask": {2: "seq", 3: "seq"}}
    assert remat.fit(model, inputs, budget=2 * least, dim="seq", dynamic_shapes=shapes).size > 8


class Placed(Mlp):
    """With positions up to 8, and no more."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.positions = nn.Parameter(torch.zeros(8, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > len(self.positions):
            raise ValueError("too long")
        return super().forward(x + self.positions[: x.shape[1]])


def test_the_largest_size_that_a_model_takes_may_be_the_examples() -> None:
    found = remat.fit(Placed().train(), (torch.randn(2, 8, 32),), budget="1GiB", dim="seq")
    assert found.size == 8
    assert "too long" in found.limit


def test_bad_input() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match="needs bytes"):
        remat.fit(model, (x,), budget=0.5)
    with pytest.raises(remat.RematError, match="needs bytes"):
        remat.fit(model, (x,), budget=None)
    with pytest.raises(remat.RematError, match="no axis of the inputs is called 'depth'; there are 'batch', 'seq'"):
        remat.fit(model, (x,), budget=2**20, dim="depth")
    with pytest.raises(remat.RematError, match="multiple_of=0"):
        remat.fit(model, (x,), budget=2**20, multiple_of=0)
    with pytest.raises(remat.RematError, match="dynamic_shapes names 'y'; this call has the arguments x"):
        remat.fit(model, (x,), budget=2**20, dynamic_shapes={"y": {0: "batch"}})
    for inputs, inside in (({"x": x}, {"y": {0: "batch"}}), ([x], [{0: "batch"}, {0: "batch"}])):
        with pytest.raises(remat.RematError, match=r"dynamic_shapes names ('y'|1) within x, where there are ('x'|0)"):
            remat.fit(model, (inputs,), budget=2**20, dynamic_shapes={"x": inside})
    with pytest.raises(remat.RematError, match="hardly grows"):
        remat.fit(Constant().train(), (torch.randn(2),), budget="1TiB")
