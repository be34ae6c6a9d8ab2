"""What a forward does besides its result: an exported graph would lose it, so that a model which does it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import remat
from tests.models import Mlp
from tests.steps import assert_same_gradients, run_step


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


def test_a_hook_on_a_tensor_is_refused() -> None:
    refused(Hooked(), "hooks the gradient of a tensor in forward")


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_of_a_submodule_is_refused(register: str) -> None:
    model = Mlp()
    getattr(model.layers[1], register)(lambda *_: None)
    refused(model, r"layers\.1 has a backward hook.*whole_model=False")


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_other_generators_are_refused(draw: Callable[[], float]) -> None:
    refused(Drawing(draw), "draw it with torch")
