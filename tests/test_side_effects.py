"""What a forward does besides its result: an exported graph would lose it, so that a model which does it is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import remat
from tests.models import Mlp
from tests.steps import assert_same, assert_same_gradients, run_step


class Balanced(Mlp):
    """Keeps a loss of its own for whoever called it, as mixtures of experts do."""

    loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.loss = self.layers[0](x).square().mean()
        return super().forward(x)


class Caching(Mlp):
    """Keeps what has no gradient: it is the same after each forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale = torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
        return super().forward(x * self.scale)


class Hooked(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layers[0](x)
        if h.requires_grad:
            h.register_hook(lambda grad: 2 * grad)
        return super().forward(h)


class Drawing(Mlp):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.draw())


class Writing(Mlp):
    """Writes to a tensor, by `write`, which gets the model and an activation and returns one."""

    def __init__(self, write: Callable[[Writing, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("mean", torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.write(self, self.layers[0](x)))


def _scale(_: Writing, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h *= 3
    return h


def _scale_detached(_: Writing, h: torch.Tensor) -> torch.Tensor:
    h.detach()[:, 1].mul_(3)
    return h


def _set_a_column(_: Writing, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h[:, 0] = 3
    return h


def _write_out(_: Writing, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        torch.mul(h, 3, out=h)
    return h


def _rectify(_: Writing, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return nn.functional.relu(h, inplace=True)


def _clamp_weights(model: Writing, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model.get_parameter("layers.1.1.weight").clamp_(-0.1, 0.1)
    return h


def _clamp_data(model: Writing, h: torch.Tensor) -> torch.Tensor:
    model.get_parameter("layers.1.1.weight").data.clamp_(-0.1, 0.1)
    return h


def _renormalize(model: Writing, h: torch.Tensor) -> torch.Tensor:
    weight = model.get_parameter("layers.1.1.weight")
    return h + nn.functional.embedding(torch.arange(8, device=h.device), weight, max_norm=0.1)


def _update_average(model: Writing, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        filled = torch.zeros_like(h)
        filled[:, 0] = 2
    return h * model.mean + filled


def _write_seen(_: Writing, h: torch.Tensor) -> torch.Tensor:
    filled = torch.zeros_like(h)
    filled[:, 1] = h[:, 0]
    return filled.add_(h).mul_(2)


def _write_in_vmap(_: Writing, h: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda row: row.clone().mul_(2))(h)


def refused(model: nn.Module, match: str) -> None:
    with pytest.raises(remat.CaptureError, match=match):
        remat.optimize(model.train(), (torch.randn(8, 32),), budget=None)


def test_a_result_with_a_gradient_that_is_kept_as_an_attribute_is_refused() -> None:
    model = Balanced()
    refused(model, r"keeps a tensor with a gradient as Balanced\.loss.*whole_model=False")
    model(torch.randn(8, 32))
    assert model.loss is not None, "attributes can be set again"


def test_an_attribute_without_a_gradient_is_no_trouble() -> None:
    model, x = Caching().train(), torch.randn(8, 32)
    expected = run_step(model, {"x": x})
    assert_same_gradients(run_step(remat.optimize(model, (x,), budget=None), {"x": x}).gradients, expected.gradients)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_torch_computes_for_each_forward_are_no_trouble() -> None:
    model, x = Mlp().train(), torch.randn(8, 32)
    torch.nn.utils.weight_norm(model.layers[0][1])
    expected = run_step(model, {"x": x})
    assert_same_gradients(run_step(remat.optimize(model, (x,), budget=None), {"x": x}).gradients, expected.gradients)


class Differentiating(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.func.grad(lambda h: self.layers[0](h).sum())(x))


def test_gradients_by_torch_func_are_refused_with_their_line() -> None:
    refused(Differentiating(), r"(?s)torch\.func.*side_effects\.py:\d+.*backend=\"remat\"")


def test_a_hook_on_a_tensor_is_refused() -> None:
    refused(Hooked(), "hooks the gradient of a tensor in forward")


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_of_a_submodule_is_refused(register: str) -> None:
    model = Mlp()
    getattr(model.layers[1], register)(lambda *_: None)
    refused(model, r"layers\.1 has a backward hook.*whole_model=False")


UNSEEN = [_scale, _scale_detached, _set_a_column, _write_out, _rectify, _clamp_weights, _clamp_data, _renormalize]


@pytest.mark.parametrize("write", UNSEEN)
def test_a_write_that_autograd_does_not_see_is_refused(write: Callable[[Writing, torch.Tensor], torch.Tensor]) -> None:
    refused(Writing(write), r"writes without grad to a tensor that has a gradient.*effects\.py:\d+.*whole_model=False")


@pytest.mark.parametrize("write", [_update_average, _write_seen, _write_in_vmap])
def test_other_writes_are_no_trouble(write: Callable[[Writing, torch.Tensor], torch.Tensor]) -> None:
    model, x = Writing(write).train(), torch.randn(8, 32)
    twin = copy.deepcopy(model)
    expected = run_step(model, {"x": x})
    assert_same_gradients(run_step(remat.optimize(twin, (x,), budget=None), {"x": x}).gradients, expected.gradients)
    assert torch.equal(twin.mean, model.mean)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_other_generators_are_refused(draw: Callable[[], float]) -> None:
    refused(Drawing(draw), "draw it with torch")


@torch.library.custom_op("remat_tests::noise", mutates_args=())
def _noise(x: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(x)  # and nothing says so: no tag


_noise.register_fake(torch.empty_like)


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)) * _noise(x)).square().mean()


def test_a_custom_op_that_draws_and_does_not_say_so_draws_the_same_again() -> None:
    model, kwargs = _Noisy(), {"x": torch.randn(64, 32)}
    plain = run_step(copy.deepcopy(model), kwargs)
    module = remat.optimize(model, (), kwargs, budget=None, policy=lambda _: remat.Decision.RECOMPUTE)
    assert module.plan is not None
    assert any("noise" in name for name in module.plan.dropped)
    assert_same(run_step(module, kwargs), plain)
