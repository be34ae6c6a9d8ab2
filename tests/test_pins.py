"""Decisions of a person, before those of the policy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import remat
from remat import Activation, Decision, devices
from remat.program import Link
from remat.settings import Settings
from remat.whole import trace
from tests.models import build
from tests.steps import Outcome, assert_same, run_step

GATES = "layers.*.mlp.gate_proj::aten.mm.default"


@functools.cache
def unchanged(name: str) -> Outcome:
    model, kwargs = build(name)
    return run_step(remat.optimize(model, (), kwargs, budget=None), kwargs)


def found(plan: remat.Plan, module: str, op: str) -> list[Activation]:
    return [a for block in plan.blocks for a in block.activations if a.module.endswith(module) and a.op == op]


@pytest.mark.parametrize("decision", list(Decision))
@pytest.mark.parametrize("policy", ["none", "blocks", "offload-all"])
def test_a_pin_comes_before_the_policy(policy: str, decision: Decision) -> None:
    model, kwargs = build("llama")
    module = remat.optimize(model, (), kwargs, budget=None, policy=policy, pin={GATES: decision.name})
    outcome = run_step(module, kwargs)
    assert_same(outcome, unchanged("llama"))
    assert module.plan is not None
    assert 0 <= module.plan.peak_bytes / outcome.peak_bytes - 1 <= 0.01
    gates = found(module.plan, "gate_proj", "aten.mm.default")
    assert [(a.decision, a.reason) for a in gates] == [(decision, "pinned")] * 2
    others = found(module.plan, "up_proj", "aten.mm.default")
    free = {"none": Decision.SAVE, "blocks": Decision.RECOMPUTE, "offload-all": Decision.OFFLOAD}[policy]
    assert [a.decision for a in others] == [free] * 2


@pytest.mark.slow
@pytest.mark.parametrize("decision", list(Decision))
def test_the_planner_plans_around_a_pin(decision: Decision, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = unchanged("llama")
    link = Link(6e3, 6e3, overlaps=True, start_us=3.0)
    monkeypatch.setattr(devices, "CPU", dataclasses.replace(devices.CPU, link=link))
    model, kwargs = build("llama")
    for host_budget in (None, "1GiB"):
        module = remat.optimize(model, (), kwargs, budget=0.8, pin={GATES: decision}, host_budget=host_budget)
        outcome = run_step(module, kwargs)
        assert_same(outcome, expected)
        assert module.plan is not None
        assert outcome.peak_bytes <= module.plan.peak_bytes <= (module.plan.budget_bytes or 0)
        assert {a.decision for a in found(module.plan, "gate_proj", "aten.mm.default")} == {decision}
        if host_budget is None and decision is not Decision.OFFLOAD:
            assert module.plan.host_bytes == 0


def test_what_can_be_pinned() -> None:
    model, kwargs = build("llama")
    traced = trace(model, (), kwargs)

    def decisions(pin: dict[str, str]) -> dict[str, Decision]:
        return dict(traced.plan(Settings(budget=None, pin=pin)).decisions)

    everything = decisions({})
    assert set(everything.values()) == {Decision.SAVE}
    one = decisions({"mm_4": "recompute"})
    assert [name for name, decision in one.items() if decision is Decision.RECOMPUTE] == ["mm_4"]
    first = decisions({"layers.0.mlp::": "RECOMPUTE"})
    assert 1 < list(first.values()).count(Decision.RECOMPUTE) < len(first) // 2
    both = decisions({"layers.?.mlp::": "RECOMPUTE"})
    assert list(both.values()).count(Decision.RECOMPUTE) == 2 * list(first.values()).count(Decision.RECOMPUTE)
    assert list(decisions({"::aten.silu*": "OFFLOAD"}).values()).count(Decision.OFFLOAD) == 2
    last = decisions({"layers.?.mlp::": "RECOMPUTE", "layers.1.mlp::": "SAVE"})
    assert last == first


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"layers.*.mpl::aten.mm.default": "SAVE"}, "matches no activation"),
        ({"mm_4000": "SAVE"}, "matches no activation"),
        ({GATES: "KEEP"}, "there are 'SAVE', 'RECOMPUTE', 'OFFLOAD'"),
        ({GATES: None}, "is no decision"),
        ([GATES], "is not a mapping"),
    ],
)
def test_pins_that_mean_nothing_are_refused(pin: object, message: str) -> None:
    model, kwargs = build("llama")
    with pytest.raises(remat.RematError, match=message):
        remat.optimize(model, (), kwargs, budget=None, pin=pin)  # type: ignore[arg-type]


def test_a_pin_that_cannot_be_carried_out_says_why() -> None:
    model, kwargs = build("mixtral")
    with pytest.raises(remat.RematError, match=r"topk cannot be recomputed: .*rout"):
        remat.plan(model, (), kwargs, budget=None, pin={"::aten.topk.default": "RECOMPUTE"})


def test_pinned_values_count_against_a_host_budget() -> None:
    model, kwargs = build("llama")
    needed = remat.plan(model, (), kwargs, budget=None, pin={GATES: "OFFLOAD"}).host_bytes
    assert needed > 0
    with pytest.raises(remat.HostBudgetError, match="host memory") as error:
        remat.plan(model, (), kwargs, budget=None, pin={GATES: "OFFLOAD"}, host_budget=needed - 1)
    assert error.value.minimum_bytes == needed


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("host_budget", [0, "1KiB"])
@pytest.mark.parametrize("door", [1, 2])
def test_a_pin_does_not_raise_the_host_budget(door: int, host_budget: int | str) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32)), torch.randn(256, 32)
    settings: Any = {"budget": None, "pin": {"::aten.tanh.default": "OFFLOAD"}, "host_budget": host_budget}
    if door == 1:
        step = remat.optimize(model, **settings)
    else:
        step = torch.compile(model, backend="remat", options={"compiler": "eager", **settings})
    with pytest.raises(remat.HostBudgetError, match="Raise host_budget=") as error:
        step(x)
    assert error.value.minimum_bytes == 256 * 32 * 4


@pytest.mark.usefixtures("_dynamo")
def test_door_2_takes_pins() -> None:
    model, kwargs = build("llama")
    pin = {GATES: "OFFLOAD", "layers.*.mlp.up_proj::": "RECOMPUTE"}
    compiled = torch.compile(model, backend="remat", options={"compiler": "eager", "pin": pin})
    outcome = run_step(compiled, kwargs)
    plan = remat.plans(compiled)[0].plan
    assert {a.decision for a in found(plan, "gate_proj", "aten.mm.default")} == {Decision.OFFLOAD}
    assert {a.decision for a in found(plan, "up_proj", "aten.mm.default")} == {Decision.RECOMPUTE}
    assert 0 <= plan.peak_bytes / outcome.peak_bytes - 1 <= 0.01
    torch._dynamo.reset()
    model, kwargs = build("llama")
    assert_same(outcome, run_step(torch.compile(model, backend="remat", options={"compiler": "eager"}), kwargs))
    with pytest.raises(remat.RematError, match="matches no activation"):
        torch.compile(model, backend="remat", options={"compiler": "eager", "pin": {"nowhere": "SAVE"}})(**kwargs)


def _policy(must: CheckpointPolicy, _: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return must if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize(("must", "products"), [(CheckpointPolicy.MUST_SAVE, 4), (CheckpointPolicy.MUST_RECOMPUTE, 6)])
@pytest.mark.parametrize("at_least", [False, True])
def test_door_2_does_what_selective_checkpointing_says_must_be(must: CheckpointPolicy, products: int, at_least: bool) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, must))

    def body(x: torch.Tensor) -> torch.Tensor:
        return (x @ x @ x).sin().cos()

    def model(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(body, x, use_reentrant=False, context_fn=contexts)

    def run(budget: int | None) -> tuple[Any, torch.Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="remat", options={"compiler": "eager", "budget": budget})
        x = torch.arange(4096.0).reshape(64, 64).div(4096).requires_grad_()
        compiled(x).sum().backward()
        return compiled, x

    budget = None
    if at_least:
        with pytest.raises(remat.BudgetError) as error:
            run(1)
        budget = error.value.minimum_bytes
    compiled, x = run(budget)
    (backward,) = [found.backward for found in remat.plans(compiled)]
    assert len(backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == products
    plain = x.detach().requires_grad_()
    model(plain).sum().backward()
    assert torch.equal(x.grad, plain.grad)


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.dropout(layer(x).exp().sigmoid(), 0.1)
        return x.square().mean()


def test_a_pin_of_whole_modules_leaves_alone_what_has_no_choice() -> None:
    torch._dynamo.reset()
    module: Any = torch.compile(
        Drawn(), backend="remat", options={"budget": None, "compiler": "eager", "pin": {"::": "RECOMPUTE"}}
    )
    module(torch.randn(64, 32))
    (graph,) = remat.plans(module)
    assert 2 <= len(graph.plan.dropped) < len(graph.plan.decisions)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot be recomputed: random"):
        torch.compile(
            Drawn(),
            backend="remat",
            options={"budget": None, "compiler": "eager", "pin": {"::aten.bernoulli.p": "RECOMPUTE"}},
        )(torch.randn(64, 32))
