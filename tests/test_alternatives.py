"""Why a value is treated as it is, and what the other ways come to."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from torch import nn

import remat
from remat.alternatives import diff, explain_value
from remat.program import HELD, Decision
from remat.simulate import simulate
from remat.whole import trace
from tests.models import llama


@functools.cache
def step() -> tuple[nn.Module, dict[str, object], remat.Plan]:
    model, kwargs = llama(layers=3)
    return model.train(), kwargs, remat.plan(model.train(), (), kwargs, budget=0.6)


def some(decision: Decision) -> str:
    """The largest value so treated whose inputs are all there."""
    found = {a.name: a for block in step()[2].blocks for a in block.activations}
    there = [a for a in found.values() if all(r not in found or found[r].decision is Decision.SAVE for r in a.reads)]
    return max((a for a in there if a.decision is decision and a.reason != "pinned"), key=lambda a: a.bytes).name


@pytest.mark.parametrize(("now", "other"), [(Decision.RECOMPUTE, Decision.SAVE), (Decision.SAVE, Decision.RECOMPUTE)])
def test_the_other_way_is_what_a_replay_gives(now: Decision, other: Decision) -> None:
    """The same plan with one decision turned, replayed."""
    model, kwargs, plan = step()
    name = some(now)
    way = next(way for way in explain_value(plan, name).alternatives if way.decision is other)
    traced = trace(model, (), kwargs)
    solution = traced.decided(plan)
    op = next(p for p, node in enumerate(traced.nodes) if node.name == name.split(".")[0])
    turned = simulate(traced.program, solution.dropped ^ {op}, None, solution.regions)
    assert way.peak_bytes == pytest.approx(turned.peak_bytes, rel=0.005)
    assert way.added_us == pytest.approx(turned.added_us - solution.replay.added_us, rel=0.1)


def test_what_is_chosen_costs_nothing_more() -> None:
    plan = step()[2]
    for name in list(plan.decisions)[::7]:
        found = explain_value(plan, name)
        (chosen,) = (way for way in found.alternatives if way.is_chosen)
        assert (chosen.peak_bytes, chosen.added_us) == (plan.peak_bytes, 0)
        assert chosen.decision is plan.decisions[name]
        assert str(found).startswith(f"{name}: {chosen.decision.value}, since: ")


def test_over_the_budget_is_said() -> None:
    text = str(explain_value(step()[2], some(Decision.RECOMPUTE)))
    assert "over the budget" in text


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(remat.RematError, match="no value 'nowhere'"):
        explain_value(step()[2], "nowhere")


def test_plans_differ_in_figures_and_decisions() -> None:
    model, kwargs, plan = step()
    everything = remat.plan(model, (), kwargs, budget=None)
    assert not diff(plan, plan)
    found = diff(plan, everything)
    assert found
    assert found.figures["recompute_us"] == (plan.recompute_us, 0)
    assert found.decisions[some(Decision.RECOMPUTE)] == ("recompute", "save")


@pytest.mark.parametrize("host", [0, "1GiB"])
def test_the_ways_are_those_that_can_be_carried_out(host: object) -> None:
    model, kwargs = llama(layers=1)
    plan = remat.plan(model.train(), (), kwargs, budget=None, host_budget=host)
    ways = {a.name: explain_value(plan, a.name).alternatives for block in plan.blocks for a in block.activations}
    found = {name: tuple(way.decision for way in alternatives) for name, alternatives in ways.items()}
    moved = (Decision.OFFLOAD,) if plan.link is not None else ()
    assert (Decision.SAVE, Decision.RECOMPUTE, *moved) in found.values()
    for activation in (a for block in plan.blocks for a in block.activations):
        if activation.reason == HELD:
            assert found[activation.name] == (Decision.SAVE,)


def test_what_can_only_be_saved_has_no_alternative() -> None:
    plan, name = step()[2], some(Decision.SAVE)
    block = next(block for block in plan.blocks if name in {a.name for a in block.activations})
    fixed = tuple(dataclasses.replace(a, ways=(Decision.SAVE,)) if a.name == name else a for a in block.activations)
    blocks = tuple(dataclasses.replace(b, activations=fixed) if b is block else b for b in plan.blocks)
    (only,) = explain_value(dataclasses.replace(plan, blocks=blocks), name).alternatives
    assert only.is_chosen
    assert len(explain_value(plan, name).alternatives) == 3
