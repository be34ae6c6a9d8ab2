"""A loss outside of the model, which planning is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import remat
from tests.steps import assert_same_gradients

WORDS, LENGTH = 2048, 64


class Words(nn.Module):
    """Blocks, and logits of a vocabulary that lead the step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 32))
            for _ in range(3)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return x @ self.embedding.weight.T


def _ids(batch: int = 4) -> torch.Tensor:
    return torch.arange(batch * LENGTH).view(batch, LENGTH) * 7 % WORDS


def _made_there(logits: torch.Tensor) -> torch.Tensor:
    """Serves batches of every size."""
    return F.cross_entropy(logits.flatten(0, 1), torch.zeros(logits.shape[:-1], dtype=torch.long).flatten())


def _elsewhere(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), TARGETS)


def _distilled(logits: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), TEACHER, log_target=True, reduction="batchmean")


BESIDE = nn.Parameter(torch.ones(()))
MADE_BEFORE = torch.ones((), requires_grad=True).exp()
TARGETS = _ids().flatten()
TEACHER = torch.linspace(-1, 1, WORDS).log_softmax(-1).expand(4, LENGTH, WORDS)


def _trained(model: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> tuple[Any, int]:
    """Gradients of a step, and what it takes."""

    def step() -> None:
        torch.manual_seed(1)
        logits = model(ids)  # held until the step ends, as plans take it to be
        found = loss(logits)
        torch.rand(3)
        found.backward()

    step()
    model.zero_grad()
    peak = remat.measure(step).peak_bytes
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients, peak


@pytest.mark.parametrize("whole_model", [True, False])
@pytest.mark.parametrize("loss", [_made_there, _elsewhere, _distilled])
def test_what_it_takes_is_in_the_plan(loss: Callable[[torch.Tensor], torch.Tensor], whole_model: bool) -> None:
    torch.manual_seed(0)
    model, ids = Words().train(), _ids()
    before, _ = _trained(model, loss, ids)
    for budget in (None, 0.95):
        remat.enable(model, budget, whole_model=whole_model, loss=loss)
        gradients, peak = _trained(model, loss, ids)
        assert_same_gradients(before, gradients)
        plan = remat.plan_of(model)
        assert 0.98 < peak / plan.peak_bytes <= 1
        assert bool(plan.dropped) == (budget is not None)
        remat.disable(model)


def test_planning_ahead_and_the_largest_batch() -> None:
    model, ids = Words().train(), _ids()
    given: dict[str, Any] = {"loss": _made_there}
    everything = remat.plan(model, (ids,), budget=None, **given)
    assert everything.peak_bytes > 1.1 * remat.plan(model, (ids,), budget=None).peak_bytes
    assert remat.plan(model, (ids,), budget=None, device="h100", **given).step_us > 0
    plans = remat.frontier(model, (ids,), points=2, **given)
    assert plans[0].peak_bytes == everything.peak_bytes
    found = remat.fit(model, (ids,), budget=plans[-1].peak_bytes, **given)
    assert found.size >= len(ids)
    assert remat.plan(model, (_ids(found.size),), budget=found.budget_bytes, **given).peak_bytes <= found.budget_bytes
    module = remat.optimize(model, (ids,), budget=None, **given)
    _, peak = _trained(module, _made_there, _ids(6))
    assert 0.98 < peak / module.plan.peak_bytes <= 1


@pytest.mark.parametrize("whole_model", [True, False])
def test_what_trains_outside_is_left_alone(whole_model: bool) -> None:
    torch.manual_seed(0)
    model, head, ids = Words().train(), nn.Linear(WORDS, 512), _ids()
    head.weight.grad = held = torch.ones_like(head.weight)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return head(logits).square().mean()

    remat.enable(model, None, whole_model=whole_model, loss=loss)
    for is_there in (True, False):
        _, peak = _trained(model, loss, ids)
        if is_there:
            assert 0.98 < peak / remat.plan_of(model).peak_bytes <= 1
        assert (head.weight.grad is held) == is_there
        assert head.bias.grad.isfinite().all()
        head.zero_grad()
        remat.disable(model)
        remat.enable(model, None, whole_model=whole_model, loss=loss)
    assert not torch.equal(held, torch.ones_like(held))  # by the steps, not by planning


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("cross_entropy", "loss='cross_entropy' cannot be called; give a function of the model's output"),
        (lambda logits: logits, "loss= has to make of the output a tensor of one number that requires grad"),
        (
            lambda logits: logits.sum().item(),
            "loss= fails on the model's output, which has no values while planning: aten._local",
        ),
        (lambda logits: logits[logits > 0].sum(), "aten.nonzero.default reads them (what a mask picks has no size there"),
        (lambda _: BESIDE, "loss= has to make of the output a tensor of one number"),
        (lambda logits: F.cross_entropy(logits.flatten(0, 1), _ids(3).flatten()), "loss= fails on the model's output"),
        (lambda logits: logits.sum() * MADE_BEFORE, "loss= reads a result whose graph was made before"),
        (lambda logits: logits.detach().sum(), "loss= has to make of the output a tensor of one number that requires grad"),
    ],
)
def test_what_is_no_loss(loss: Any, message: str) -> None:
    with pytest.raises(remat.RematError, match=message.replace("(", r"\(")):
        remat.plan(Words().train(), (_ids(),), budget=None, loss=loss)
