"""Where backward begins: at the loss that a model returns, or at all that it returns; and the peak is that of such a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import remat

_Loss = Callable[[Any], torch.Tensor]


class _Coder(nn.Module):
    """Something between two stacks of layers has a loss of its own."""

    def __init__(self, returns: Callable[..., Any]) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(8)]
        self.encoder, self.decoder, self.returns = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:]), returns

    def forward(self, x: torch.Tensor) -> Any:
        code = self.encoder(x)
        found = self.decoder(code)
        return self.returns(found, code.square().mean(), (found - x).square().mean())


_STEPS: dict[str, tuple[Callable[..., Any], _Loss]] = {
    "result, a part of the loss": (lambda found, part, _: (found, part), lambda out: out[0].square().mean() + out[1]),
    "a part, result": (lambda found, part, _: (part, found), lambda out: out[1].square().mean() + out[0]),
    "two parts": (lambda _, part, loss: {"code": part, "error": loss}, lambda out: out["code"] + out["error"]),
    "result, loss": (lambda found, _, loss: (found, loss), lambda out: out[1]),
    "loss among others": (lambda found, part, loss: {"part": part, "found": found.t(), "loss": loss}, lambda out: out["loss"]),
}


@pytest.mark.parametrize("whole_model", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("returned", _STEPS)
def test_backward_begins_at_what_is_returned(returned: str, whole_model: bool) -> None:
    returns, loss_of = _STEPS[returned]
    model, x = _Coder(returns), torch.randn(512, 32)
    optimized = remat.enable(model, 0.6, whole_model=whole_model)
    loss_of(optimized(x)).backward()
    optimized.zero_grad(set_to_none=True)
    measured = remat.measure(lambda: loss_of(optimized(x)).backward())
    plan = remat.plan_of(optimized)
    assert plan is not None
    assert plan.dropped
    assert 0.95 * plan.peak_bytes <= measured.peak_bytes <= plan.peak_bytes
