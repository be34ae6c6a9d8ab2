"""Loops of one's own, with and without accelerate: 100 steps beside the plain model's, with what people put around a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel

import remat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

_Loop: TypeAlias = Callable[[nn.Module], tuple[list[float], nn.Module]]
_BATCHES = torch.randint(0, 64, (10, 4, 32), generator=torch.Generator().manual_seed(0))


def _tied() -> GPT2LMHeadModel:
    """The head's weight is the embedding's, and dropout is on. No cache: it lays keys out otherwise, which rounds otherwise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)).train()


def _loop(model: nn.Module) -> tuple[list[float], nn.Module]:
    """AdamW, clipping, an average of the weights; the losses and the average."""
    torch.manual_seed(1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(100):
        ids = _BATCHES[step % len(_BATCHES)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        losses.append(loss.item())
    return losses, average


def _accelerated(model: nn.Module) -> tuple[list[float], nn.Module]:
    """The same in accelerate, bfloat16, two batches to a step."""
    torch.manual_seed(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests have made one, of other settings
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for step in range(100):
        ids = _BATCHES[step % len(_BATCHES)]
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, accelerator.unwrap_model(model)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [_loop, _accelerated], ids=["plain", "accelerate"])
@pytest.mark.parametrize("whole_model", [True, False], ids=["whole", "blocks"])
def test_a_loss_curve_is_the_plain_models(loop: _Loop, whole_model: bool) -> None:
    expected, plain = loop(_tied())
    model = remat.enable(_tied(), 0.75, whole_model=whole_model)
    found, ours = loop(model)
    exact = loop is _loop  # bfloat16 rounds
    assert found == (expected if exact else pytest.approx(expected, rel=1e-2))
    assert found[-1] < found[0]
    plan = remat.plan_of(model)
    assert plan is not None
    assert plan.dropped
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert not exact or torch.equal(a, b), name


class _Even(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight + weight.flip(0)).div(2)


@pytest.mark.parametrize("whole_model", [True, False], ids=["whole", "blocks"])
def test_parametrized_weights(whole_model: bool) -> None:
    """Weights that are computed anew in each forward, and share what they are computed from."""
    torch.manual_seed(0)
    stages = (nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Dropout(0.1), nn.Linear(48, 24)) for _ in range(3))
    model = nn.Sequential(*stages)
    for stage in model:
        parametrizations.weight_norm(stage[0])
        parametrize.register_parametrization(stage[3], "weight", _Even())
    plain, x = copy.deepcopy(model), torch.randn(64, 24)
    remat.enable(model, 0.9, whole_model=whole_model)
    for each in (model, plain):
        torch.manual_seed(2)
        each(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
