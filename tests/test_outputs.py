"""Where backward begins: at the loss that a model returns, or at all that it returns; and the peak is that of such a step, with
what autograd keeps of parts that get no gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import remat
from tests.steps import assert_same_gradients

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


class _Aside(nn.Module):
    """Two stacks, of which one gets no gradient."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        stacks = [[nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(3)] for _ in range(2)]
        self.trained, self.other = nn.Sequential(*stacks[0]), nn.Sequential(*stacks[1])
        self._forward = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


def _with_aside(self: Any, x: torch.Tensor) -> Any:
    hidden = self.trained(x)
    return {"loss": hidden.square().mean(), "aside": self.other(hidden)}


def _with_accuracy(self: Any, x: torch.Tensor) -> Any:
    hidden = self.trained(x)
    return {"loss": hidden.square().mean(), "accuracy": (self.other(hidden).argmax(1) == 0).float().mean()}


def _stopped(self: Any, x: torch.Tensor) -> Any:
    return {"loss": (self.trained(x) * self.other(x).detach()).mean()}


def _unused(self: Any, x: torch.Tensor) -> Any:
    self.other(x)
    return {"loss": self.trained(x).square().mean()}


@pytest.mark.parametrize("whole_model", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("forward", [_with_aside, _with_accuracy, _stopped, _unused])
def test_parts_without_a_gradient_count(forward: Any, whole_model: bool) -> None:
    model, x = _Aside(forward), torch.randn(512, 32)
    plain = copy.deepcopy(model)
    plain(x)["loss"].backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    remat.enable(model, 1, whole_model=whole_model)
    with pytest.raises(remat.BudgetError) as caught:
        model(x)
    for budget in (None, caught.value.minimum_bytes):
        remat.disable(model)
        remat.enable(model, budget, whole_model=whole_model)
        model(x)["loss"].backward()
        assert_same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)
        model.zero_grad(set_to_none=True)
        measured = remat.measure(lambda: [out := model(x), out["loss"].backward()])  # the aside is held meanwhile
        model.zero_grad(set_to_none=True)
        plan = remat.plan_of(model)
        assert plan is not None
        assert 0.95 * plan.peak_bytes <= measured.peak_bytes <= plan.peak_bytes


def test_autograd_keeps_nothing_of_what_is_detached() -> None:
    x = torch.randn(512, 32)
    alone = remat.plan(_Aside(lambda self, x: self.trained(x).square().mean()), (x,), budget=None)
    stopped = remat.plan(_Aside(lambda self, x: (self.trained(x) + self.other(x).detach()).square().mean()), (x,), budget=None)
    assert stopped.peak_bytes - stopped.resident_bytes < 1.3 * (alone.peak_bytes - alone.resident_bytes)


class _Watched(nn.Module):
    """Returns a loss, and what every stack makes beside it; or without the loss."""

    def __init__(self, *, has_loss: bool = True) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(8)]
        self.layers, self.watch, self.has_loss = nn.ModuleList(layers), nn.Linear(32, 64), has_loss

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = x
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        aside = self.watch(hidden).tanh()  # has a graph that backward from the loss does not enter
        found = {"hidden": hidden, "wide": torch.cat([hidden] * 4, 1), "aside": aside}
        return {"loss": (hidden - x).square().mean(), **found} if self.has_loss else found


def _squared(output: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["hidden"].square().mean()


@pytest.mark.parametrize("whole_model", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("loss", [None, _squared], ids=["its own", "outside"])
def test_outputs_take_nothing_in_backward_where_the_loop_lets_go_of_them(loss: _Loss | None, whole_model: bool) -> None:
    model, x = _Watched(has_loss=loss is None), torch.randn(512, 32)
    loss_of = loss or (lambda output: output["loss"])
    expected = copy.deepcopy(model)
    loss_of(expected(x)).backward()

    def let_go() -> None:
        loss_of(optimized(x)).backward()

    def hold() -> None:
        output = optimized(x)
        loss_of(output).backward()

    peaks = {}
    for holds, step in ((True, hold), (False, let_go)):
        optimized = remat.enable(copy.deepcopy(model), 0.6, whole_model=whole_model, loss=loss, holds_outputs=holds)
        step()
        for ours, theirs in zip(optimized.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
        optimized.zero_grad(set_to_none=True)
        measured = remat.measure(step)
        plan = remat.plan_of(optimized)
        assert plan is not None
        assert plan.dropped
        assert plan.holds_outputs == holds
        assert 0.98 * plan.peak_bytes <= measured.peak_bytes <= plan.peak_bytes
        peaks[holds] = plan.baseline_peak_bytes
    assert peaks[False] < peaks[True] - 3 * x.nbytes  # most of the copies


def test_a_loss_that_nobody_tells_may_hold_the_outputs() -> None:
    model, x = _Watched(has_loss=False), torch.randn(512, 32)
    plan = remat.plan(model, (x,), budget=None, holds_outputs=False)
    assert plan.holds_outputs
    assert plan.timeline == remat.plan(model, (x,), budget=None).timeline


def test_what_is_returned_is_saved_while_forward_runs() -> None:
    model, x = _Watched(), torch.randn(512, 32)
    plan = remat.plan(model, (x,), budget=0.6, holds_outputs=False, policy="offload-all")
    outputs = {storage.name for storage in plan.storages if storage.kind == "outputs"}
    assert outputs
    assert outputs.isdisjoint(transfer.name for transfer in plan.transfers)
    with pytest.raises(remat.RematError, match="holds_outputs='no' is neither True nor False"):
        remat.plan(model, (x,), budget=None, holds_outputs="no")  # type: ignore[arg-type]


class _Momentum(nn.Module):
    """A target network that follows by a moving average, in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(2))
        self.target.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for follows, leads in zip(self.target.parameters(), self.online.parameters(), strict=True):
                follows.lerp_(leads, 0.1)
            wanted = self.target(x)
        return (self.online(x) - wanted).square().mean()


def test_what_forward_writes_back_goes_with_its_end() -> None:
    model, x = _Momentum(), torch.randn(256, 64)
    optimized = remat.optimize(model, (x,), budget=None)
    found = remat.verify(optimized, args=(x,))
    assert [check.name for check in found.checks if not 0 <= check.predicted_bytes - check.measured_bytes < 8192] == []
