"""What real kernels keep and return, where torch's fake ones say less, counts: recurrent layers, losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import remat
from remat._torch import FakeTensorMode, pytree
from remat.fake_kernels import as_run
from remat.workspace import Call, workspace_bytes
from tests.steps import run_step

recurrent = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(32, 32, num_layers=3, batch_first=True)
        self.head = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0]).tanh().square().mean()


def smallest(model: nn.Module, x: torch.Tensor) -> int:
    with pytest.raises(remat.BudgetError) as caught:
        remat.optimize(model, (x,), budget=1)
    assert caught.value.minimum_bytes is not None
    return caught.value.minimum_bytes


@recurrent
def test_what_the_kernel_keeps_counts() -> None:
    x = torch.randn(16, 40, 32)
    ours = remat.optimize(Recurrent(), (x,), budget=None)
    measured = run_step(ours, {"x": x}).peak_bytes
    assert measured <= ours.plan.peak_bytes <= 1.02 * measured


@recurrent
def test_computed_again_it_gives_the_same_gradients_within_the_smallest_budget() -> None:
    model, x = Recurrent(), torch.randn(16, 40, 32)
    expected = run_step(copy.deepcopy(model), {"x": x})
    budget = smallest(model, x)
    assert smallest(model, x) == budget
    ours = remat.optimize(model, (x,), budget=budget)
    assert any("mkldnn_rnn_layer" in name for name in ours.plan.dropped)
    found = run_step(ours, {"x": x})
    assert found.peak_bytes <= budget < expected.peak_bytes
    assert all(torch.equal(found.gradients[name], gradient) for name, gradient in expected.gradients.items())


@recurrent
def test_a_layer_that_there_is_no_room_to_run_keeps_more_than_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remat.fake_kernels.has_room", lambda _: False)
    model, x = nn.LSTM(24, 40), torch.randn(12, 4, 24)
    peaks = []
    for _room in range(2):
        peaks.append(remat.plan(model.train(), (x,), budget=None).peak_bytes)
        monkeypatch.undo()
    assert peaks[0] >= peaks[1]


class Reconstruction(nn.Module):
    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self.layers = nn.Sequential(nn.Linear(24, 24), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(self.layers(x), x)


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.binary_cross_entropy, F.huber_loss], ids=lambda f: f.__name__
)
def test_a_mean_in_the_storage_of_what_it_is_the_mean_of(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    model, x = Reconstruction(loss).train(), torch.rand(64, 100, 24)
    ours = remat.optimize(model, (x,), budget=None)
    measured = run_step(ours, {"x": x}).peak_bytes
    assert measured <= ours.plan.peak_bytes <= 1.02 * measured
    compiled: Any = torch.compile(model, backend="remat", options={"compiler": "eager"})
    measured = run_step(compiled, {"x": x}).peak_bytes
    (graph,) = remat.plans(compiled)
    assert measured <= graph.plan.peak_bytes <= 1.02 * measured


def test_a_sum_in_the_storage_of_what_it_is_the_sum_of() -> None:
    op, windows = torch.ops.aten.col2im.default, torch.randn(8, 100, 144).mT
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = (mode.from_tensor(windows), [100, 1], [9, 1], [1, 1], [4, 0], [1, 1])
        found = as_run(op, args, {}, op(*args))
    real = op(windows, *args[1:])
    assert found.shape == real.shape
    assert found.stride() == real.stride()
    assert found.untyped_storage().nbytes() == real.untyped_storage().nbytes() == windows.nbytes > real.nbytes


def test_what_a_kernel_makes_too_large_is_no_part_of_what_it_returns() -> None:
    call = Call.of(torch.ops.aten.col2im.default, (torch.randn(8, 144, 100), [100, 1], [9, 1], [1, 1], [4, 0], [1, 1]), {})
    assert workspace_bytes(call) == 0


def test_the_layouts_of_gradients() -> None:
    aten, turned, mask = torch.ops.aten, torch.randn(4, 32, 64).mT, torch.rand(4, 64, 32) > 0.5
    statistics, weight = torch.randn(4, 64, 1), torch.randn(32)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.native_dropout_backward.default, (turned, mask, 2.0)),
        (
            aten.native_layer_norm_backward.default,
            (turned, turned, [32], statistics, statistics, weight, weight, [True, False, False]),
        ),
    ]
    for op, args in calls:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake_args = pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            fake = op(*fake_args)
            (found, *_) = pytree.tree_leaves(as_run(op, fake_args, {}, fake))
        real, guessed = pytree.tree_leaves(op(*args))[0], pytree.tree_leaves(fake)[0]
        assert guessed.stride() != real.stride() == found.stride()
