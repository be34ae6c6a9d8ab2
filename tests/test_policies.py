"""Fixed rules through both doors: what they decide, and that the step is the same."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

import remat
from remat import Activation, Decision
from remat.settings import Settings
from remat.whole import trace
from tests.lanes import slow_copies
from tests.models import build, llama, mlp
from tests.steps import Outcome, assert_same, run_step

POLICIES = ("blocks", "every-2", "sqrt", "selective", "offload", "offload-all")


@functools.cache
def unchanged(name: str) -> Outcome:
    model, kwargs = build(name)
    return run_step(remat.optimize(model, (), kwargs, budget=None), kwargs)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpt2", "convnext"])
def test_the_step_is_the_same_and_its_peak_predicted(name: str, policy: str) -> None:
    model, kwargs = build(name)
    module = remat.optimize(model, (), kwargs, budget=None, policy=policy)
    outcome = run_step(module, kwargs)
    assert_same(outcome, unchanged(name))
    assert module.plan is not None
    assert 0 <= module.plan.peak_bytes / outcome.peak_bytes - 1 <= 0.01
    assert (module.plan.host_bytes > 0) == policy.startswith("offload")


@functools.cache
def plan_of(policy: object) -> remat.Plan:
    model, kwargs = llama()
    return remat.plan(model.train(), (), kwargs, budget=None, policy=policy)  # type: ignore[arg-type]


def test_what_the_rules_decide() -> None:
    model, kwargs = llama(layers=5)
    traced = trace(model.train(), (), kwargs)
    found = {policy: traced.plan(Settings(None, policy)) for policy in POLICIES}  # type: ignore[arg-type]
    everything = traced.plan(Settings(None, "none"))
    assert [len(found[policy].regions) for policy in ("blocks", "every-2", "sqrt", "selective")] == [5, 3, 2, 5]
    assert found["every-2"].recompute_us == pytest.approx(found["blocks"].recompute_us * 3 / 5, rel=0.01)
    assert found["selective"].recompute_us < found["blocks"].recompute_us
    assert found["blocks"].saved_bytes < found["selective"].saved_bytes < everything.saved_bytes
    assert found["sqrt"].saved_bytes < found["blocks"].saved_bytes
    assert found["offload"].recompute_us == found["blocks"].recompute_us
    assert found["offload"].saved_bytes + found["offload"].host_bytes == found["blocks"].saved_bytes
    assert found["offload-all"].recompute_us == 0
    assert found["offload-all"].saved_bytes + found["offload-all"].host_bytes == everything.saved_bytes
    assert set(found["offload"].decisions.values()) == set(Decision)


def test_blocks_that_do_not_train_are_left_alone() -> None:
    model, kwargs = llama(layers=4)
    model.requires_grad_(False)
    for layer in model.model.layers[2:]:  # type: ignore[union-attr, index]
        layer.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(True)  # type: ignore[union-attr]
    model.train()
    regions = [
        len(remat.plan(model, (), kwargs, budget=None, policy="blocks", trainable_only=only).regions) for only in (True, False)
    ]
    assert regions == [2, 4]


@pytest.mark.parametrize("decision", [remat.Decision.RECOMPUTE, "RECOMPUTE", "recompute"])
def test_a_function_may_name_its_decision(decision: remat.Decision | str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    plan = remat.plan(model, (torch.randn(4, 8),), budget=None, policy=lambda activation: decision)
    assert plan.dropped


def test_what_is_no_decision_of_a_function_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    with pytest.raises(remat.RematError, match=r"the policy for .*: 'KEEP' is no decision; there are 'SAVE', 'RECOMPUTE'"):
        remat.plan(model, (torch.randn(4, 8),), budget=None, policy=lambda activation: "KEEP")  # type: ignore[arg-type]


def test_the_outermost_list_of_modules_names_the_blocks() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(4)])
    plan = remat.plan(model, (torch.randn(4, 8),), budget=None, policy="blocks")
    assert [plan.regions[i] for i in (0, 3)] == [("t", "getitem"), ("t_3", "getitem_9")]
    assert {plan.decisions[name] for name in ("addmm", "gelu", "addmm_3", "gelu_3")} == {Decision.RECOMPUTE}


def test_a_model_without_lists_of_modules_is_cut_by_the_planner() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu().exp()).tanh().sum()

    model, x = Plain(), torch.randn(64, 32)
    module = remat.optimize(model, (x,), budget=None, policy="blocks")
    assert module.plan is not None
    assert module.plan.regions
    module(x).backward()


def by_size(activation: Activation) -> Decision | None:
    """A policy of one's own."""
    if activation.op == "aten.silu.default":
        return Decision.RECOMPUTE
    return Decision.OFFLOAD if activation.bytes > 2**16 else None


def test_a_function_decides_for_each_activation() -> None:
    found = plan_of(by_size)
    activations = [a for block in found.blocks for a in block.activations if a.module.startswith("model.layers")]
    assert {a.decision for a in activations if a.op == "aten.silu.default"} == {Decision.RECOMPUTE}
    assert {a.decision for a in activations} == set(Decision)
    for a in activations:
        if a.decision is Decision.OFFLOAD:
            assert a.bytes > 2**16
    model, kwargs = build("llama")
    assert_same(run_step(remat.optimize(model, (), kwargs, budget=None, policy=by_size), kwargs), unchanged("llama"))


def test_a_policy_that_needs_more_than_the_budget_is_an_error() -> None:
    needs = plan_of("blocks").peak_bytes
    model, kwargs = llama()
    assert remat.plan(model.train(), (), kwargs, budget=needs, policy="blocks").budget_bytes == needs
    with pytest.raises(remat.BudgetError, match="policy='blocks' needs") as error:
        remat.optimize(model, (), kwargs, budget=needs - 1, policy="blocks")
    assert error.value.minimum_bytes == needs


@pytest.mark.parametrize("policy", ["every-0", "every-", "every-k", "block", "", 3])
def test_unknown_policies_are_refused(policy: object) -> None:
    with pytest.raises(remat.RematError, match="'sqrt'"):
        remat.optimize(mlp()[0], budget=None, policy=policy)  # type: ignore[arg-type]


def test_a_plan_that_offloads_survives_json() -> None:
    model, kwargs = build("llama")
    found = remat.plan(model, (), kwargs, budget=None, policy="offload")
    again = remat.Plan.from_json(found.to_json())
    assert again == found
    assert_same(run_step(remat.optimize(model, (), kwargs, budget=None, plan=again), kwargs), unchanged("llama"))


def test_transfers_show_in_the_graph() -> None:
    model, kwargs = llama()
    module = remat.optimize(model.train(), (), kwargs, budget=None, policy="offload")
    assert module.plan is not None
    text = "".join(str(child.graph) for name, child in module.named_children() if name.startswith("region_"))
    for transfer in module.plan.transfers:
        assert f"remat.passes.transfers.offload](args = (%{transfer.name}, (0,))" in text
        assert re.search(rf"transfers.release\]\(args = \(\([^)]*\b{transfer.name}\b", text)
    assert f"on the host {module.plan.host_bytes / 2**10:.2f} KiB" in module.plan.summary()


@pytest.mark.slow
@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("door", [1, 2])
def test_twenty_steps_with_copies_that_take_their_time(door: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies on threads, each after a random pause, and the plan as for a link that overlaps."""
    expected = twenty_steps(door, "none", 0.0)
    overlapping(monkeypatch)
    assert twenty_steps.__wrapped__(door, policy, 0.002) == expected


@functools.cache
def twenty_steps(door: int, policy: str, delay_s: float) -> list[float]:
    """Losses, and sums of gradients."""
    torch._dynamo.reset()
    model, kwargs = build("gpt2")
    if door == 1:
        step_of = remat.optimize(model, (), kwargs, budget=None, policy=policy)
    else:
        step_of = torch.compile(model, backend="remat", options={"compiler": "eager", "policy": policy})
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(3)
    seen = []
    for step in range(20):
        with slow_copies(torch.device("cpu"), delay_s * (step % 3)):
            loss = step_of(**kwargs).loss
            torch.rand(step)
            loss.backward()
        optimizer.step()
        seen += [loss.item(), *(p.grad.double().sum().item() for p in model.parameters() if p.grad is not None)]
        optimizer.zero_grad()
    return seen


def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from remat import devices

    link = devices.CPU.link._replace(overlaps=True)
    monkeypatch.setattr(devices, "CPU", dataclasses.replace(devices.CPU, link=link))


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.slow), "convnext"])
def test_door_2_takes_the_same_rules(name: str) -> None:
    def through(policy: str) -> tuple[Outcome, remat.Plan]:
        torch._dynamo.reset()
        model, kwargs = build(name)
        step = torch.compile(model, backend="remat", options={"compiler": "eager", "policy": policy})
        return run_step(step, kwargs), remat.plans(step)[0].plan

    expected, everything = through("none")
    for policy in ("blocks", "selective", "offload", "offload-all"):
        outcome, plan = through(policy)
        assert_same(outcome, expected)
        assert outcome.peak_bytes <= plan.peak_bytes < everything.peak_bytes
        assert plan.peak_bytes / outcome.peak_bytes <= 1.01
        assert (plan.host_bytes > 0) == policy.startswith("offload")


@pytest.mark.usefixtures("_dynamo")
def test_a_plan_that_offloads_is_not_compiled() -> None:
    model, x = mlp()
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")
    with pytest.raises(Exception, match="runs eagerly"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x)
