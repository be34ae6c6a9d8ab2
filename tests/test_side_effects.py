"""What a forward does besides its result: an exported graph would lose it, so that a model which does it is refused."""

from __future__ import annotations

import copy
import functools
import logging
import random
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import remat
from remat import opaque
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


class Forces(Mlp):
    """An energy, and the loss of what its gradient is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        energy = super().forward(x).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().mean()


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_gradient_taken_in_forward_is_refused(whole_model: bool) -> None:
    for budget in (None, 0.9):
        model = remat.enable(Forces().train(), budget, whole_model=whole_model)
        with pytest.raises(remat.CaptureError, match="the model takes a gradient in forward"):
            model(torch.randn(8, 32))


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_first_call_that_a_checkpoint_runs_in_its_backward_takes_none(whole_model: bool) -> None:
    model, x = Mlp().train(), torch.randn(8, 32, requires_grad=True)
    gradients = []
    for step in range(2):
        torch.manual_seed(1)
        checkpoint(model, x, use_reentrant=True).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
        if not step:
            remat.enable(model, None, whole_model=whole_model)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_modes_that_track_modules_are_none_of_the_models() -> None:
    model, x = Mlp().train(), torch.randn(8, 32)
    with FlopCounterMode(display=False) as plain:
        model(x).sum().backward()
    remat.enable(model, None)
    with FlopCounterMode(display=False) as ours:
        model(x).sum().backward()
    assert ours.get_total_flops() == plain.get_total_flops() > 0


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


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, np.random.mtrand._rand.rand, lambda: random._inst.random()],
    ids=["python", "numpy", "numpy's generator", "python's generator"],
)
@pytest.mark.parametrize("beside", [0, 1])
def test_random_numbers_of_other_generators_are_refused(draw: Callable[[], float], beside: int) -> None:
    done = threading.Event()
    others = [threading.Thread(target=done.wait, args=(60,)) for _ in range(beside)]  # which draw nothing
    for other in others:
        other.start()
    try:
        refused(Drawing(draw), "draw it with torch")
    finally:
        done.set()


def test_a_list_that_forward_adds_to_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    class Seen(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(len(x))
            return super().forward(x)

    model, x = Seen().train(), torch.randn(4, 32)
    for _ in range(2):
        remat.optimize(model, (x,), budget=None)
    assert model.seen == []
    assert caplog.text.count("Seen changes seen in forward: planned steps") == 1


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


class Keeping(Mlp):
    """Keeps an activation where `keep` puts it."""

    def __init__(self, keep: Callable[[Keeping, torch.Tensor, list[torch.Tensor]], None]) -> None:
        super().__init__()
        self.keep, self.found, self.by_name = keep, list[torch.Tensor](), dict[str, torch.Tensor]()
        self.last = types.SimpleNamespace(value=None)

    def forward(self, x: torch.Tensor, sink: list[torch.Tensor]) -> torch.Tensor:
        h = self.layers[0](x)
        self.keep(self, h, sink)
        return super().forward(h)


FOUND: list[torch.Tensor] = []
KEEPS = [
    lambda self, h, sink: self.found.append(h),
    lambda self, h, sink: self.by_name.update(h=h),
    lambda self, h, sink: setattr(self, "pair", (h, 1)),
    lambda self, h, sink: setattr(self.last, "value", h),
    lambda self, h, sink: sink.append(h),
    lambda self, h, sink: FOUND.append(h),
]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_result_with_a_gradient_that_is_kept_anywhere_is_refused(keep: Any) -> None:
    FOUND.clear()
    model, x = Keeping(keep).train(), torch.randn(8, 32)
    with pytest.raises(remat.CaptureError, match=r"keeps a tensor with a gradient beyond its call \(.*\), which an"):
        remat.optimize(model, (x, []), budget=None)
    assert not model.found
    assert not model.by_name


def test_what_a_hook_keeps_is_refused() -> None:
    found: list[torch.Tensor] = []
    for detached in (False, True):
        model = Mlp().train()
        model.layers[1].register_forward_hook(lambda _, args, out, d=detached: found.append(out.detach() if d else out))
        with pytest.raises(remat.CaptureError, match=r"keeps a tensor.* beyond its call \(layers\.1\._forward_hooks\)"):
            remat.optimize(model, (torch.randn(8, 32),), budget=None)


@functools.lru_cache
def positions(n: int) -> torch.Tensor:
    return torch.linspace(0, 1, n)


@functools.cache
def slopes(n: int) -> tuple[torch.Tensor, ...]:
    return (torch.linspace(1, 2, n),)


@functools.cache
def backend() -> object:
    """What is loaded once."""
    return object()


def _rewritten(model: nn.Module, x: torch.Tensor, way: str) -> nn.Module:
    if way == "optimize":
        return remat.optimize(model, (x,), budget=None)
    return remat.enable(model, None, whole_model=way == "whole")


BACKENDS: list[object] = []


class Remembering(Mlp):
    """Keeps tensors without gradients in caches, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.seen, self.steps = dict[int, torch.Tensor](), list[torch.Tensor](), 0

    @staticmethod
    @functools.lru_cache
    def scale(n: int) -> torch.Tensor:
        return torch.linspace(1, 2, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        if n not in self.cache:
            self.cache[n] = torch.linspace(2, 3, n)
        self.seen.append(x.detach().mean())
        self.steps += 1
        BACKENDS.append(backend())
        x = x * slopes(n)[0]
        return super().forward(self.layers[0](x * self.cache[n] + positions(n)) * self.scale(n))


@pytest.mark.parametrize("way", ["optimize", "whole", "blocks"])
def test_caches_are_left_as_they_were(way: str, caplog: pytest.LogCaptureFixture) -> None:
    opaque.say_changed.cache_clear()
    for cached in (positions, slopes, backend, Remembering.scale):
        cached.cache_clear()
    BACKENDS.clear()
    model, x = Remembering().train(), torch.randn(8, 32)
    plain = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "remat"):
        ours = run_step(_rewritten(model, x, way), {"x": x}).gradients
    assert_same_gradients(ours, run_step(plain, {"x": x}).gradients)
    assert ("Remembering changes steps in forward" in caplog.text) == (way != "blocks")
    assert set(BACKENDS) == {backend()}
    for tensor in (*model.cache.values(), *model.seen, positions(32), *slopes(32), model.scale(32)):
        assert type(tensor) is torch.Tensor
    assert type(model.eval()(x)) is torch.Tensor


class Centred(nn.Module):
    """A part with a buffer that is assigned to."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("centre", like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.centre is None:
            self.centre = torch.zeros(8)
        before, out = self.centre, (x - self.centre).tanh() * self.centre
        self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        self.centre = self.centre * 0.9
        return out + before * x * self.centre


@pytest.mark.parametrize("way", ["optimize", "whole", "blocks"])
def test_buffers_of_submodules_that_are_assigned_to(way: str) -> None:
    model, x = nn.Sequential(Centred(torch.ones(8)), Centred(torch.ones(8))).train(), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    module = _rewritten(model, x, way)
    for _ in range(3):
        ours, theirs = module(x), plain(x)
        assert torch.equal(ours, theirs)
        ours.sum().backward(), theirs.sum().backward()
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_buffers_that_get_another_shape_are_refused() -> None:
    model, x = Centred(None).train(), torch.randn(4, 8)
    with pytest.raises(remat.CaptureError, match=r"gives its buffer Centred\.centre another shape or type in forward"):
        remat.optimize(model, (x,), budget=None)
    model(x)
    assert torch.equal(remat.optimize(copy.deepcopy(model), (x,), budget=None)(x), model(x))


class Averaging(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.zeros(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return super().forward(x - self.average)


def _seeded(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return x * torch.rand_like(x)


def _same_twice(x: torch.Tensor) -> torch.Tensor:
    before = torch.get_rng_state()
    y = torch.rand_like(x)
    torch.set_rng_state(before)
    return x * y * torch.rand_like(x)


def _detached(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.detach_()
    return x + y


@pytest.mark.parametrize(
    ("do", "match"),
    [
        (_seeded, r"sets the state of random numbers \(torch's fork_rng\) in forward.*side_effects\.py:\d+"),
        (_same_twice, r"sets the state of random numbers \(torch's set_rng_state\) in forward"),
        (_detached, r"detaches a tensor in place"),
    ],
)
def test_what_a_graph_does_not_do_is_refused(do: Callable[[torch.Tensor], torch.Tensor], match: str) -> None:
    class Doing(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(do(self.layers[0](x)))

    refused(Doing(), match)


def test_a_tensor_that_is_replaced_is_refused() -> None:
    refused(Averaging(), r"replaces average, a tensor that it reads")


@pytest.mark.parametrize("cut", [lambda x: x.data, lambda x: x.detach().requires_grad_()])
def test_ways_to_detach(cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Straight(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.layers[0](x)
            return super().forward(h + cut(h.round() - h))

    model, x = Straight().train(), torch.randn(8, 32)
    expected = run_step(model, {"x": x})
    assert_same_gradients(run_step(remat.optimize(model, (x,), budget=None), {"x": x}).gradients, expected.gradients)


class Noisy(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.randn(x.shape, generator=self.generator))


def test_planning_draws_nothing_from_generators_of_the_models_own() -> None:
    model, x = Noisy().train(), torch.randn(8, 32)
    plain = copy.deepcopy(model)
    remat.enable(model, None, whole_model=False)
    torch.manual_seed(1)
    ours = [model(x) for _ in range(3)]
    torch.manual_seed(1)
    assert ours == [plain(x) for _ in range(3)]
