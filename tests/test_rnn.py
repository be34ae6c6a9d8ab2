"""A CPU's recurrent layers: what their kernel keeps for backward counts, and it keeps that when it runs again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import remat
from tests.steps import run_step

if not torch.backends.mkldnn.is_available():
    pytest.skip("torch was built without oneDNN", allow_module_level=True)


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


def test_what_the_kernel_keeps_counts() -> None:
    x = torch.randn(16, 40, 32)
    ours = remat.optimize(Recurrent(), (x,), budget=None)
    measured = run_step(ours, {"x": x}).peak_bytes
    assert measured <= ours.plan.peak_bytes <= 1.02 * measured


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


def test_a_layer_that_there_is_no_room_to_run_keeps_more_than_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remat.rnn.has_room", lambda _: False)
    model, x = nn.LSTM(24, 40), torch.randn(12, 4, 24)
    peaks = []
    for _room in range(2):
        peaks.append(remat.plan(model.train(), (x,), budget=None).peak_bytes)
        monkeypatch.undo()
    assert peaks[0] >= peaks[1]
