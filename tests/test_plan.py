"""Plans as data and as text."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

import remat
from remat.report import summary
from tests.models import llama


@functools.cache
def plan() -> remat.Plan:
    """Four equal layers at the smallest budget."""
    model, kwargs = llama(layers=4)
    return remat.frontier(model.train(), (), kwargs)[-1]


def test_json_round_trip() -> None:
    text = plan().to_json()
    assert json.loads(text)["peak_bytes"] == plan().peak_bytes
    again = remat.Plan.from_json(text)
    assert again == plan()
    assert again.decisions == plan().decisions
    assert again.to_json() == text
    assert again.summary() == plan().summary()


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", "null", "{}", '{"format": 1}', '{"format": 99}', '"text"', '{"format": 1, "blocks": [{}]}'],
)
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(remat.RematError):
        remat.Plan.from_json(text)


def test_a_plan_with_other_fields_is_refused() -> None:
    data = json.loads(plan().to_json())
    with pytest.raises(remat.RematError):
        remat.Plan.from_json(json.dumps({**data, "unknown": 1}))
    del data["timeline"]
    with pytest.raises(remat.RematError):
        remat.Plan.from_json(json.dumps(data))


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().peak_bytes = 0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().blocks[0].name = ""  # type: ignore[misc]
    hash(plan().blocks[0])


def test_numbers_agree_with_each_other() -> None:
    found = plan()
    assert found.resident_bytes < found.peak_bytes < found.baseline_peak_bytes
    assert found.peak_bytes == max(moment.live_bytes for moment in found.timeline)
    assert found.step_us == pytest.approx(found.baseline_step_us + found.recompute_us)
    assert found.recompute_us > 0
    assert found.recompute_us == pytest.approx(sum(block.recompute_us for block in found.blocks))
    assert found.saved_bytes <= found.peak_bytes - found.resident_bytes
    assert found.planning_seconds >= 0
    assert found.device == "cpu"
    assert found.door == "eager"


def test_the_timeline_runs_forward_then_backward() -> None:
    phases = [moment.phase for moment in plan().timeline]
    first = phases.index("backward")
    assert "recompute" not in phases[: phases.index("recompute")]
    assert "forward" not in phases[min(first, phases.index("recompute")) :]


def test_decisions_say_what_and_why() -> None:
    found = plan()
    assert set(found.decisions.values()) == {remat.Decision.SAVE, remat.Decision.RECOMPUTE}
    for block in found.blocks:
        for activation in block.activations:
            assert activation.reason
            assert activation.bytes > 0
            assert activation.dtype
            assert activation.name in found.decisions
    dropped = {name for name, decision in found.decisions.items() if decision is remat.Decision.RECOMPUTE}
    assert {name.split(".")[0] for name in dropped} <= set(found.dropped)


def test_values_name_their_module_and_source() -> None:
    activations = [a for block in plan().blocks for a in block.activations]
    assert any(a.module.startswith("model.layers.2") for a in activations)
    assert any(a.source.startswith("modeling_llama.py:") for a in activations)


def test_the_summary_merges_equal_blocks() -> None:
    text = plan().summary()
    assert text == str(plan()) == summary(plan())
    titles = [line for line in text.splitlines() if line.startswith("── ")]
    assert any("(x" in title and "-" in title for title in titles)
    assert len(titles) < len(plan().blocks)
    assert "budget" in text.splitlines()[0]
    for word in ("value", "shape", "dtype", "bytes", "decision", "reason", "source", "module"):
        assert word in text


def test_explain_is_the_plan() -> None:
    model, kwargs = llama(layers=1)
    module = remat.optimize(model.train(), (), kwargs, budget=None)
    assert remat.explain(module) is module.plan
    explained = remat.explain(model, (), kwargs, budget=0.9)
    assert "recompute" in str(explained)


def test_the_policy_none_saves_everything() -> None:
    model, kwargs = llama(layers=1)
    found = remat.plan(model.train(), (), kwargs, budget=1, policy="none")
    assert not found.dropped
    assert found.peak_bytes == found.baseline_peak_bytes


def test_planning_twice_gives_the_same() -> None:
    model, kwargs = llama(layers=1)
    first = remat.plan(model.train(), (), kwargs, budget=0.8)
    second = remat.plan(model, (), kwargs, budget=0.8)
    assert dataclasses.replace(first, planning_seconds=0.0) == dataclasses.replace(second, planning_seconds=0.0)


def test_a_frontier_within_a_budget() -> None:
    model, kwargs = llama(layers=1)
    everything = remat.frontier(model.train(), (), kwargs, points=4)
    limit = everything[1].peak_bytes
    within = remat.frontier(model, (), kwargs, budget=limit, points=4)
    assert [p.peak_bytes for p in within] == [p.peak_bytes for p in everything[1:]]
