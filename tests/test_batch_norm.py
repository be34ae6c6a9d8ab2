"""Batch norm, of which backward runs again all but what it writes back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

import remat
from tests.steps import assert_same_gradients


class Stack(nn.Module):
    """Convolutions, each with its batch norm."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation()) for _ in range(6))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


class Affine(nn.Module):
    """Batch norm with some of its parameters."""

    def __init__(self, weight: bool, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 8)
        self.weight = nn.Parameter(torch.full((64,), 3.0)) if weight else None
        self.bias = nn.Parameter(torch.ones(64)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = F.batch_norm(self.first(x), torch.zeros(64), torch.ones(64), self.weight, self.bias, training=True)
        return self.last(F.gelu(normal)).square().mean()


class Reads(nn.Module):
    """What batch norm writes back is read in the same step, by what backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.scale = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = F.gelu(self.norm(self.first(x)))
        assert self.norm.running_mean is not None
        return (normal * (self.norm.running_mean * 2).exp() + self.norm.running_mean * self.scale).square().mean()


def two_steps(model: nn.Module, step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of the second, and the buffers after it."""
    for _ in range(2):
        model.zero_grad()
        step(x).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(("whole", "share"), [(True, 0.8), (False, 0.95)])
@pytest.mark.parametrize("activation", [nn.GELU, lambda: nn.ReLU(inplace=True)])
def test_a_stack_takes_less_than_when_each_layer_is_checkpointed(
    activation: Callable[[], nn.Module], whole: bool, share: float
) -> None:
    model, x = Stack(activation), torch.randn(8, 8, 32, 32)
    expected = two_steps(twin := copy.deepcopy(model), twin, x)
    twin.zero_grad()
    checkpointed = remat.measure(
        lambda: checkpoint_sequential(twin.layers, 6, x, use_reentrant=False).square().mean().backward()
    )
    step = remat.enable(model, int(share * checkpointed.peak_bytes), whole_model=whole)
    assert_same_gradients(two_steps(model, step, x), expected)
    model.zero_grad()
    measured, plan = remat.measure(lambda: step(x).backward()), remat.plan_of(step)
    assert plan is not None
    assert 0.99 * plan.peak_bytes <= measured.peak_bytes <= plan.peak_bytes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_with_some_of_its_parameters_it_runs_again_with_those(weight: bool, bias: bool) -> None:
    model, x = Affine(weight, bias), torch.randn(16, 8)
    expected = two_steps(twin := copy.deepcopy(model), twin, x)
    step = remat.optimize(model, (x,), budget=None, policy=lambda _: remat.Decision.RECOMPUTE)
    assert_same_gradients(two_steps(model, step, x), expected)


def test_new_statistics_that_the_step_reads_stay() -> None:
    model, x = Reads(), torch.randn(16, 8)
    expected = two_steps(twin := copy.deepcopy(model), twin, x)
    step = remat.optimize(model, (x,), budget=None, policy=lambda _: remat.Decision.RECOMPUTE)
    assert_same_gradients(two_steps(model, step, x), expected)
