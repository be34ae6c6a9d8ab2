"""A model that changes after it was captured is captured again: graphs hold its attributes, hooks and submodules."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat import state
from tests.models import mlp


class Scaled(nn.Module):
    """Counts its calls, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.0)) for _ in range(2))
        self.scale: Any = 1.0
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return (x * self.scale).sum()


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _scale(m: Any) -> None:
    m.scale = 10.0


def _integer_scale(m: Any) -> None:
    m.scale = 1


def _dropout(m: Any) -> None:
    m.layers[0][2].p = 0.5


def _hook(m: Any) -> None:
    m.layers[1].register_forward_hook(doubled)


def _layers(m: Any) -> None:
    torch.manual_seed(7)
    m.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))


def _layer(m: Any) -> None:
    m.layers[1] = nn.Identity()


def _dtype(m: Any) -> None:
    m.double()


def _slope(m: Any) -> None:
    m.layers[0][1] = nn.Hardtanh()


CHANGES = [_scale, _integer_scale, _dropout, _hook, _layers, _layer, _dtype, _slope]
IN_PLACE = [_scale, _dropout, _hook, _dtype]  # the others replace modules, which enabled models refuse


def scaled() -> tuple[Scaled, torch.Tensor]:
    torch.manual_seed(0)
    return Scaled(), torch.randn(4, 8)


def step(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(x.to(next(model.parameters()).dtype))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def assert_same_step(model: Any, plain: Any, x: torch.Tensor) -> None:
    (loss, gradients), (expected, wanted) = step(model, x), step(plain, x)
    assert torch.equal(loss, expected)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "on"), [*((change, "the module") for change in CHANGES), (_scale, "the original"), (_layers, "the original")]
)
def test_a_change_after_capture_counts(change: Any, on: str) -> None:
    model, x = scaled()
    plain = copy.deepcopy(model)
    module = remat.optimize(model, (x,), budget=None)
    assert_same_step(module, plain, x)
    change(module if on == "the module" else model)
    change(plain)
    assert_same_step(module, plain, x)
    assert list(module.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        module.eval(), plain.eval()
        x = x.to(plain.layers[0][0].weight.dtype)
        assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_change_of_an_enabled_model_counts(change: Any, whole: bool) -> None:
    model, x = scaled()
    plain = copy.deepcopy(model)
    remat.enable(model, None, whole_model=whole, policy="none")
    assert_same_step(model, plain, x)
    change(model), change(plain)
    assert_same_step(model, plain, x)


@pytest.mark.parametrize("way", ["optimize", "whole", "blocks"])
def test_a_forward_that_counts_its_calls_is_captured_once(way: str) -> None:
    model, x = scaled()
    if way == "optimize":
        module: Any = remat.optimize(model, budget=None)
    else:
        module = remat.enable(model, None, whole_model=way == "whole", policy="none")
    step(module, x)
    plan = remat.plan_of(module)
    for _ in range(3):
        step(module, x)
    assert remat.plan_of(module) is plan


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * (2 if x is y else 3) + y).sum()


@pytest.mark.parametrize("way", ["optimize", "enable", "compiled"])
def test_arguments_that_are_one_tensor_once(way: str) -> None:
    """A graph captured so reads one where there are two later, and the other way round."""
    torch.manual_seed(0)
    model, (x, y) = Two(), torch.randn(2, 4, 8)
    plain = copy.deepcopy(model)
    if way == "enable":
        module: Any = remat.enable(model, None)
    else:
        module = remat.optimize(model, (x, x), budget=None)
        module(y, x)
    called = torch.compile(module, backend="eager") if way == "compiled" else module
    for pair in ((x, x), (x, y), (y, x), (y, y)):
        assert torch.equal(called(*pair), plain(*pair))
    if way != "compiled":  # Dynamo does not look whether an argument is a parameter
        other = torch.randn(8, 8)
        for mine, theirs in ((model.layer.weight, plain.layer.weight), (other, other)):
            assert torch.equal(called(mine, other), plain(theirs, other))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).tanh()).square().mean()


@pytest.mark.parametrize("way", ["optimize", "enable"])
def test_weights_that_are_tied_once(way: str) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(8)
    plain = copy.deepcopy(model)
    module: Any = remat.optimize(model, (ids,), budget=None) if way == "optimize" else remat.enable(model, None)
    assert torch.equal(module(ids), plain(ids))
    for changed in (model, plain):
        torch.manual_seed(1)
        changed.head.weight = nn.Parameter(torch.randn(8, 8))
    module(ids).backward()
    plain(ids).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_graph_that_served_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "KEPT", 2)
    model, x = scaled()
    module = remat.optimize(model, budget=None)
    for size in (4, 3, 4, 2):  # the last takes the place of the second
        module(x[:size])
    before = module.plan
    module(x[:4])
    plan = module.plan
    assert plan is not before
    module(x[:2])
    module(x[:4])
    assert module.plan is plan


def test_going_back_takes_the_graph_that_is_there() -> None:
    model, x = scaled()
    module = remat.optimize(model, (x,), budget=None)
    first = module.plan
    for scale in (2.0, 1.0):
        module.scale = scale
        step(module, x)
    assert module.plan is first
    assert len(module._variants) == 2


def test_what_is_set_on_a_module_is_set_on_the_original() -> None:
    model, x = scaled()
    module = remat.optimize(model, (x,), budget=None, policy="blocks")
    regions = [name for name, _ in module.named_children() if name.startswith("region_")]
    assert regions
    module.scale = 3.0
    module.extra = nn.Linear(8, 8)
    module.add_module("other", nn.Tanh())
    module.weight = nn.Parameter(torch.ones(2))
    module._mark = 1  # of a library that wraps modules
    assert model.scale == module.scale == 3.0
    assert model.extra is module.extra
    assert model.other is module.other
    assert model.weight is module.weight
    assert not hasattr(model, "_mark")
    assert [name for name, _ in module.named_children() if name.startswith("region_")] == regions
    del module.extra, module.scale
    assert not hasattr(model, "extra")
    assert not hasattr(module, "scale")
    assert list(module.state_dict()) == list(model.state_dict())


def test_a_copy_does_not_take_an_old_graph_for_a_changed_model() -> None:
    model, x = scaled()
    module = remat.optimize(model, (x,), budget=None)
    twin = copy.deepcopy(module)
    assert_same_step(twin, model, x)
    assert len(twin._variants) == 1
    _scale(module)
    assert_same_step(copy.deepcopy(module), model, x)
    _layers(module)
    assert_same_step(copy.deepcopy(module), model, x)


@pytest.mark.usefixtures("_dynamo")
def test_a_change_of_a_compiled_module_is_seen() -> None:
    model, x = scaled()
    module = remat.optimize(model, (x,), budget=None)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    for change in (_scale, _hook):
        change(module)
        module(x)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("whole", [True, False])
def test_many_captures_are_said_once_and_bounded(
    whole: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "KEPT", 9)
    model, x = scaled()
    remat.enable(model, None, whole_model=whole, policy="none")
    dropout = model.layers[0][2]
    with caplog.at_level(logging.WARNING, logger="remat"):
        for i in range(11):
            dropout.p = i / 20
            step(model, x)
    (said,) = [r.getMessage() for r in caplog.records if "captured and planned 8 times" in r.getMessage()]
    assert "Dropout.p" in said
    kept = model._remat._step._variants if whole else model._remat._variants
    assert len(kept) == 9


def test_arguments_of_other_types_are_other_calls() -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, ids: torch.Tensor, by: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x).sum(), ids * by

    model, ids = Times(), torch.arange(3)
    module = remat.optimize(model, budget=None)
    for by in (1, 1.0):
        assert module(torch.ones(2, 4), ids, by)[1].dtype == model(torch.ones(2, 4), ids, by)[1].dtype


class _Masked(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mask = nn.Linear(8, 8), torch.ones(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.mask).tanh()


@pytest.mark.parametrize("door", ["optimize", "whole", "blocks"])
def test_a_tensor_that_is_an_attribute_is_read_at_each_call(door: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(_Masked(), _Masked()), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    if door == "optimize":
        module: Any = remat.optimize(model, (x,), budget=None)
    else:
        module = remat.enable(model, None, whole_model=door == "whole")
    module(x)
    with caplog.at_level(logging.INFO, logger="remat"):
        for mask in (torch.zeros(4, 8), torch.full((4, 8), 2.0)):
            for each in (model, plain):
                each[1].mask = mask
            assert torch.equal(module(x), plain(x))
        model[0].mask.fill_(0.5), plain[0].mask.fill_(0.5)
        assert torch.equal(module(x), plain(x))
        assert not [r for r in caplog.records if r.name == "remat"], "these are served by what was captured"
    for another in (torch.rand(1, 8), 3.0):
        for each in (model, plain):
            each[1].mask = another
        assert torch.equal(module(x), plain(x))
    twin = copy.deepcopy(module)
    model[1].mask = plain[1].mask = 4.0
    assert not torch.equal(twin(x), plain(x))


@pytest.mark.parametrize("door", ["optimize", "whole", "blocks"])
def test_a_model_that_is_frozen_meanwhile(door: str) -> None:
    """A critic trains in one step and only passes gradients on in another; where there are none, it runs as it was."""
    model, x = mlp()
    module = remat.optimize(model, budget=None) if door == "optimize" else model
    if module is model:
        remat.enable(model, None, whole_model=door == "whole")
    module(x).backward()
    model.requires_grad_(False)
    assert not module(x).requires_grad
    passed = x.clone().requires_grad_()
    torch.manual_seed(1)
    module(passed).backward()
    found, passed.grad = passed.grad, None
    torch.manual_seed(1)
    if module is model:
        remat.disable(model)
    model(passed).backward()
    assert torch.equal(found, passed.grad)


def test_tensors_that_are_laid_out_otherwise_are_captured_anew() -> None:
    """A graph takes views that only some strides allow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(4, 4, 8)
    optimized = remat.optimize(model, (x,), budget="1GiB")
    before = optimized.plan
    for given in (x.transpose(0, 1), x[:1].expand(4, 4, 8), x):
        model.zero_grad()
        model(given).square().sum().backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        optimized(given).square().sum().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert optimized.plan is before


def test_strides_of_axes_with_one_entry_are_not_looked_at() -> None:
    model, x = mlp()
    row = x[:1]
    optimized = remat.optimize(model, (row,), budget="1GiB")
    plan = optimized.plan
    optimized(x.t().contiguous().t()[:1].as_strided(row.shape, (7, 1))).backward()
    assert optimized.plan is plan
