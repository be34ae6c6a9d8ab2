"""What the recorder counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import remat
from remat import _torch
from remat._torch import fake_like
from remat.devices import profile_of
from remat.recorder import Recorder
from remat.settings import Settings
from remat.whole import trace
from tests.models import Weighted
from tests.steps import assert_same, run_step


def test_memory_made_after_constants_have_gone_counts() -> None:
    recorder = Recorder(profile_of(torch.device("cpu")))
    with _torch.FakeTensorMode():
        constants = [fake_like(torch.empty(16)) for _ in range(100)]
        for constant in constants:
            recorder.know(constant)
        del constant, constants  # what is made next is likely to lie in their place
        with recorder.forward():
            made = [torch.empty(16) for _ in range(100)]
    assert len(recorder.all) == len(made)


class _Sums(nn.Module):
    """`function` reads a little of two large values in several places, so that their gradients are all there is."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.linspace(-1, 1, 2**16).view(256, 256)) for _ in range(2))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.first.view_as(self.first), self.second.view_as(self.second)) * x


class _PlusOne(torch.autograd.Function):
    """Adds to a gradient in a formula, which is out of place."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + torch.ones_like(gradient)


def _attended(memory: torch.Tensor) -> torch.Tensor:
    """A decoder's steps: the gradients that each gives are views of matrix products."""
    query = torch.ones(16, 256, 1)
    return (memory @ query).sum() + (memory @ query).sum() + (memory @ query).sum()


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a[2].sum() + a[1].sum() + a[0].sum(),
        lambda a, b: (a + 2 * a)[0].sum(),
        lambda a, b: a[1].sum() + a.sum(),
        lambda a, b: a[0].sum() + torch.cat([a, a.detach()[:, :1]], 1)[0].sum(),
        lambda a, b: _attended(a.view(16, 16, 256)),
        lambda a, b: a[1].sum() + (a + b)[0].sum(),
        lambda a, b: (a + a)[0].sum(),
        lambda a, b: _PlusOne.apply(a)[0].sum(),
    ],
    ids=[
        "slices",
        "residual",
        "of one number",
        "with gaps",
        "views",
        "held by another",
        "to itself",
        "in a formula",
    ],
)
def test_gradients_are_added_in_place_where_autograd_does(function: Callable[..., torch.Tensor]) -> None:
    model, kwargs = _Sums(function), {"x": torch.tensor(2.0)}
    module = remat.optimize(model, kwargs=kwargs, budget=None)
    outcome = run_step(module, kwargs)
    assert_same(run_step(model, kwargs), outcome)
    assert 0.99 < outcome.peak_bytes / module.plan.peak_bytes <= 1


def test_constants_that_ops_bring_along_are_resident_and_no_op_of_the_step() -> None:
    model, x = Weighted(), torch.randn(512, 128)
    plain = run_step(model, {"x": x})
    traced = trace(model, (), {"x": x})
    assert [op.name for op in traced.program.forward] == [node.name for node in traced.nodes]
    least = traced.smallest(Settings(None)).replay.peak_bytes
    assert least < 0.9 * traced.everything.peak_bytes
    rewritten = remat.optimize(model, (), {"x": x}, budget=least)
    assert_same(plain, run_step(rewritten, {"x": x}))
    assert remat.verify(rewritten, kwargs={"x": x}).holds
