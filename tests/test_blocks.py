"""Models rewritten block by block: in place, planned as one step."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from tests import models
from tests.steps import run_step

_ABOVE = 16_384  # bytes by which a prediction may be too high: what a CPU step of these models needs beside its tensors


def _same(ours: Any, plain: Any) -> None:
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.rng, plain.rng)
    assert ours.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(ours.gradients[name], gradient), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_gradients_and_peak(name: str) -> None:
    """Dropout is on in all but llama, and random numbers are drawn between forward and backward."""
    model, kwargs = models.build(name)
    plain = run_step(copy.deepcopy(model), kwargs)
    budget = 0.7
    remat.optimize_blocks(model, (), kwargs, budget=budget)
    plan = remat.plan_of(model)
    assert plan is not None
    assert plan.budget_bytes is not None
    ours = run_step(model, kwargs)
    _same(ours, plain)
    assert len(plan.dropped) > 0
    assert ours.peak_bytes <= plan.peak_bytes <= plan.budget_bytes
    assert plan.peak_bytes - ours.peak_bytes <= _ABOVE
    assert ours.peak_bytes < plain.peak_bytes


def test_the_unoptimized_step_is_predicted() -> None:
    model, kwargs = models.llama(layers=3)
    plain = run_step(copy.deepcopy(model), kwargs)
    remat.optimize_blocks(model, (), kwargs, budget=None)
    plan = remat.plan_of(model)
    assert plan is not None
    assert not plan.dropped
    assert 0 <= plan.peak_bytes - plain.peak_bytes <= _ABOVE


def test_accumulating_and_other_shapes() -> None:
    model, kwargs = models.gpt2()
    plain = copy.deepcopy(model)
    remat.enable(model, 0.8, whole_model=False)
    for inputs in (kwargs, kwargs, {name: ids[:2] for name, ids in kwargs.items()}):
        for each in (model, plain):
            torch.manual_seed(3)
            each(**inputs).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_the_same_object_in_eval_and_after() -> None:
    model, kwargs = models.llama()
    before = list(model.state_dict())
    remat.enable(model, 0.7, whole_model=False)
    model(**kwargs).loss.backward()
    assert list(model.state_dict()) == before
    model.eval()
    assert model.generate(kwargs["input_ids"][:1, :4], max_new_tokens=3).shape == (1, 7)
    remat.disable(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    model.train()
    model(**kwargs).loss.backward()


class _Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 2


class _Odd(nn.Module):
    """What one graph cannot hold, between blocks: an autograd function, looks at values, an output of a class of its own."""

    class Result:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 32)) for _ in range(4)
        )
        self.seen = 0

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        self.seen += 1
        full = bool(mask.all())
        ends = True in mask[[0, -1]]  # through a constant
        ours = torch.where(torch.ones(len(x)) > 0, torch.tensor(1.0), 0.0)  # a mask of the code's own
        for i, stage in enumerate(self.stages):
            x = x + stage(x)
            if i == 1 and ours.all() and not full and not ends:
                x = _Doubles.apply(x) * mask[:, None]
        return _Odd.Result(x).logits


def test_a_model_that_one_graph_cannot_hold() -> None:
    torch.manual_seed(0)
    model, x = _Odd(), torch.randn(64, 32)
    some = torch.arange(64) % 3 > 0
    with pytest.raises(remat.CaptureError, match=r"(?s)full = bool\(mask.all\(\)\).*whole_model=False"):
        remat.optimize(model, (x, some), budget=0.8)
    plain = copy.deepcopy(model)
    remat.enable(model, 0.8, whole_model=False)
    for mask in (some, torch.ones(64, dtype=torch.bool), some):  # the second takes another way
        for each in (model, plain):
            torch.manual_seed(1)
            each(x, mask).square().sum().backward()
    assert (model.seen, plain.seen) == (3, 3)  # planning does not change the model
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


class _Gated(nn.Module):
    """Blocks that are called with other shapes as the values of the inputs say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(2))

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([layer(x[: int(count)]), x[int(count) :]])
        return x


def test_values_choose_among_plans() -> None:
    torch.manual_seed(0)
    model, x = _Gated(), torch.randn(8, 16)
    plain = copy.deepcopy(model)
    remat.enable(model, None, whole_model=False, policy="blocks")
    for count in (8, 5, 8, 5):
        for each in (model, plain):
            each(x, torch.tensor(count)).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_frozen_blocks_run_as_they_are() -> None:
    model, x = models.mlp(layers=4)
    model.layers[:2].requires_grad_(False)
    plain = copy.deepcopy(model)
    remat.optimize_blocks(model, (x,), budget=None, policy="blocks")
    plan = remat.plan_of(model)
    assert plan is not None
    assert {name.split("_")[1] for name in plan.dropped} == {"2", "3"}
    for each in (model, plain):
        torch.manual_seed(0)
        each(x).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_under_autocast() -> None:
    model, kwargs = models.build("gpt2")
    plain = copy.deepcopy(model)
    remat.enable(model, 0.75, whole_model=False)

    def step(each: nn.Module) -> None:
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = each(**kwargs).loss
        loss.backward()

    step(plain)
    step(model)
    model.zero_grad()
    measured = remat.measure(lambda: step(model)).peak_bytes
    plan = remat.plan_of(model)
    assert plan is not None
    assert 0.97 * plan.peak_bytes < measured <= plan.peak_bytes <= (plan.budget_bytes or 0)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_pins_and_policies() -> None:
    model, kwargs = models.llama()
    remat.optimize_blocks(
        model, (), kwargs, budget=None, policy="selective", pin={"layers.0.mlp::aten.mm.default": "RECOMPUTE"}
    )
    plan = remat.plan_of(model)
    assert plan is not None
    decided = {a.name: a.decision.name for block in plan.blocks for a in block.activations if a.op == "aten.mm.default"}
    assert {name for name, decision in decided.items() if decision == "RECOMPUTE"}
    assert all("layers_0_" in name for name, decision in decided.items() if decision == "RECOMPUTE")
    twin = copy.deepcopy(model)
    remat.disable(model)
    _same(run_step(twin, kwargs), run_step(model, kwargs))
    assert remat.plan_of(twin) == dataclasses.replace(plan, planning_seconds=remat.plan_of(twin).planning_seconds)  # a copy too


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"policy": "offload"}, "reaches across blocks"),
        ({"policy": "sqrt"}, "reaches across blocks"),
        ({"host_budget": "1GiB"}, "nothing moves to the host"),
        ({"pin": {"aten.mm.default": "OFFLOAD"}}, "matches no activation"),
        ({"pin": {"::aten.mm.default": "OFFLOAD"}}, "cannot move to the host"),
        ({"polcy": "blocks"}, "unknown setting 'polcy'"),
        ({"blocks": []}, r"blocks=\[\] is no list of blocks"),
        ({"blocks": "model.layers"}, "blocks='model.layers' is no list of blocks"),
    ],
)
def test_settings_without_a_meaning_here(settings: dict[str, Any], text: str) -> None:
    model, kwargs = models.llama(layers=1)
    with pytest.raises(remat.RematError, match=text):
        remat.optimize_blocks(model, (), kwargs, budget=None, **settings)
    assert all("forward" not in module.__dict__ for module in model.modules())  # left as it was


def test_no_host_memory_at_all_is_no_trouble() -> None:
    model, x = models.mlp()
    remat.optimize_blocks(model, (x,), budget=None, host_budget=0)
    model(x).backward()


class _Recursive(nn.Module):
    """Calls itself on the second half of its input, between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[0](x).relu()
        if len(x) > 4:
            with torch.no_grad():
                y = y + self(x[4:]).sum()
        return self.layers[1](y)


def test_a_model_that_calls_itself() -> None:
    model, x = _Recursive(), torch.randn(8, 8)
    plain = copy.deepcopy(model)
    remat.optimize_blocks(model, (x,), budget=None, policy="blocks")
    _same(run_step(model, {"x": x}), run_step(plain, {"x": x}))


def test_a_budget_too_small_names_the_smallest() -> None:
    model, kwargs = models.llama()
    with pytest.raises(remat.BudgetError, match="the smallest needs") as caught:
        remat.optimize_blocks(model, (), kwargs, budget=1000)
    assert "host_budget" not in str(caught.value)
    remat.optimize_blocks(model, (), kwargs, budget=caught.value.minimum_bytes)


def test_blocks_by_their_paths() -> None:
    model = models.Mlp().train()
    remat.optimize_blocks(model, (torch.randn(64, 32),), budget=None, blocks=["layers.1", model.layers[2]])
    assert list(vars(model)["_remat"].blocks) == ["layers.1", "layers.2"]


def test_bad_blocks() -> None:
    model, x = models.mlp()
    with pytest.raises(remat.RematError, match="not a module inside"):
        remat.optimize_blocks(model, (x,), budget=None, blocks=[nn.Linear(2, 2)])
    with pytest.raises(remat.RematError, match=r"'layers\.9' is not a module inside"):
        remat.optimize_blocks(model, (x,), budget=None, blocks=["layers.0", "layers.9"])
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(remat.RematError, match=r"0\.0 lies inside of 0"):
        remat.optimize_blocks(nested, budget=None, blocks=[nested[0], nested[0][0]])
    with pytest.raises(remat.RematError, match="has no ModuleList"):
        remat.optimize_blocks(nn.Linear(2, 2), budget=None)


def test_a_block_called_alone_or_otherwise() -> None:
    model, x = models.mlp()
    remat.optimize_blocks(model, (x,), budget=None, policy="blocks")
    with pytest.raises(remat.RematError, match="outside of the model's forward"):
        model.layers[0](x)


class _Threaded(nn.Module):
    """Runs its blocks, or the last of them, on a thread of its own."""

    def __init__(self, first: int, trains: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.first, self.trains = first, trains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grad = torch.is_grad_enabled() and self.trains

        def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(grad):
                return layer(x).relu()

        for layer in self.layers[: self.first]:
            x = layer(x).relu()
        with ThreadPoolExecutor(1) as pool:
            for layer in self.layers[self.first :]:
                x = x + pool.submit(run, layer, x).result()
        return x.square().mean()


@pytest.mark.parametrize("first", [0, 1])
def test_a_block_on_another_thread(first: int) -> None:
    model = _Threaded(first)
    remat.enable(model, None, whole_model=False)
    with pytest.raises(remat.RematError, match="on a thread that forward started, which planning does not follow"):
        model(torch.randn(4, 8))


def test_a_block_without_grad_on_another_thread() -> None:
    model, x = _Threaded(1, trains=False), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    remat.optimize_blocks(model, (x,), budget=None)
    _same(run_step(model, {"x": x}), run_step(plain, {"x": x}))


class _Drops(nn.Module):
    """Calls a block once more than it did when it was planned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.times = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.layers[0](x)
        return x


def test_more_calls_than_planned_are_an_error() -> None:
    model, x = _Drops(), torch.randn(4, 8)
    remat.optimize_blocks(model, (x,), budget=None)
    model.times = 2
    with pytest.raises(remat.RematError, match=r"layers\.0 of _Drops was called otherwise .* more often"):
        model(x)


class _Looks(nn.Module):
    """Looks at values of activations between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x) if x.sum() > 0 else x


class _Checkpoints(_Looks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layers[1], self.layers[0](x), use_reentrant=True)


def test_blocks_that_run_in_backward_are_refused() -> None:
    with pytest.raises(remat.CaptureError, match=r"layers.1 runs in backward too"):
        remat.optimize_blocks(_Checkpoints(), (torch.randn(4, 8),), budget=None)


class _Picks(_Looks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x[x.sum(-1) > 0])


@pytest.mark.parametrize("kind", [_Looks, _Picks])
def test_a_look_at_activations_is_an_error(kind: type[_Looks]) -> None:
    with pytest.raises(remat.CaptureError, match="reads the value of a tensor between its blocks"):
        remat.optimize_blocks(kind(), (torch.randn(4, 8),), budget=None)


class _Leaves(_Looks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[1](self.layers[0](x))
        return x * float(x.detach().numpy().max() > -9)


def test_what_planning_cannot_do_between_blocks_says_so() -> None:
    with pytest.raises(remat.CaptureError, match=r"_Leaves fails between its blocks, .*without values: \.numpy"):
        remat.optimize_blocks(_Leaves(), (torch.randn(4, 8),), budget=None)


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_first_call_with_other_parameters(whole_model: bool) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    remat.enable(model, None, whole_model=whole_model)
    with pytest.raises(remat.CaptureError, match=r"0.weight is no nn.Parameter in this call, as within"):
        torch.func.functional_call(model, parameters, (x,))
    model(x).sum().backward()
    torch.func.functional_call(model, parameters, (x,)).sum().backward()
    assert torch.equal(parameters["0.weight"].grad, model[0].weight.grad)


def test_nothing_moves_where_the_host_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host has room by default."""
    monkeypatch.setattr("remat.traced.resolve_host_budget", lambda *_: 2**40)
    model, kwargs = models.llama()
    assert remat.plan(model, (), kwargs, budget=0.55).transfers  # as a whole it does move
    remat.optimize_blocks(model, (), kwargs, budget=0.55)
    plan = remat.plan_of(model)
    assert plan is not None
    assert not plan.transfers
    assert run_step(model, kwargs).peak_bytes <= plan.peak_bytes


def test_in_eval_mode_there_is_nothing_to_plan() -> None:
    model, kwargs = models.llama(layers=1)
    with pytest.raises(remat.RematError, match="eval mode"):
        remat.optimize_blocks(model.eval(), (), kwargs, budget=None)


class _Settles(models.Mlp):
    """Runs its blocks without grad first (a deep equilibrium model), and with grad then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x
        with torch.no_grad():
            for _ in range(3):
                for layer in self.layers:
                    found = x + 0.5 * layer(found)
        return super().forward(found)


def test_blocks_that_also_run_without_grad() -> None:
    model, x = _Settles().train(), torch.randn(64, 32)
    expected = run_step(model, {"x": x})
    remat.enable(model, None, whole_model=False)
    _same(run_step(model, {"x": x}), expected)
    plan = remat.plan_of(model)
    run_step(model, {"x": x})
    assert remat.plan_of(model) is plan


class _WithConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.sqrt(torch.tensor(4.0))
        return x + nn.functional.gelu(self.first(x) / scale).tanh() @ self.second.weight.t()


def test_constants_within_blocks_are_no_ops_of_the_step() -> None:
    torch.manual_seed(0)
    model, kwargs = nn.Sequential(*(_WithConstant() for _ in range(3))), {"input": torch.randn(512, 16)}
    plain = run_step(copy.deepcopy(model), kwargs)
    with pytest.raises(remat.BudgetError) as error:
        remat.optimize_blocks(model, (), kwargs, budget=1)
    remat.optimize_blocks(model, (), kwargs, budget=error.value.minimum_bytes)
    plan = remat.plan_of(model)
    assert plan is not None
    ours = run_step(model, kwargs)
    _same(ours, plain)
    assert len(plan.dropped) > 0
    assert 0 <= plan.peak_bytes - ours.peak_bytes <= _ABOVE
