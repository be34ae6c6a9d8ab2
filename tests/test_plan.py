"""Plans as data and as text."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import nn

import remat
from remat.program import KINDS
from remat.table import summary
from tests.models import llama


@functools.cache
def plan() -> remat.Plan:
    """Four equal layers at the smallest budget."""
    model, kwargs = llama(layers=4)
    return remat.frontier(model.train(), (), kwargs, points=2)[-1]


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


def test_storages_and_kinds_add_up_to_the_timeline() -> None:
    found = plan()
    live, by_kind = [[0] * len(found.timeline) for _ in range(2)], dict.fromkeys(KINDS, 0)
    top = max(range(len(found.timeline)), key=lambda i: found.timeline[i].live_bytes)
    for storage in found.storages:
        for i in range(storage.born, storage.dies + 1):
            live[0][i] += storage.bytes
        by_kind[storage.kind] += storage.bytes * (storage.born <= top <= storage.dies)
    live[1] = [sum(moment.by_kind) for moment in found.timeline]
    assert live[0] == live[1] == [moment.live_bytes for moment in found.timeline]
    assert found.at_peak() == {kind: size for kind, size in by_kind.items() if size}
    assert sum(found.at_peak().values()) == found.peak_bytes
    assert max(moment.live_bytes for moment in found.baseline_timeline) == found.baseline_peak_bytes


def test_kinds_are_what_they_say() -> None:
    found, (model, kwargs) = plan(), llama(layers=4)
    parameters = sum(p.nbytes for p in model.parameters())
    last = dict(zip(KINDS, found.timeline[-1].by_kind, strict=True))
    assert last["parameters"] == parameters
    assert last["gradients"] == parameters
    assert last["inputs"] == kwargs["input_ids"].nbytes
    assert last["activations"] == last["recomputed"] == 0
    middle = next(i for i, moment in enumerate(found.timeline) if moment.phase != "forward")
    assert dict(zip(KINDS, found.timeline[middle - 1].by_kind, strict=True))["activations"] >= found.saved_bytes
    assert any(dict(zip(KINDS, moment.by_kind, strict=True))["recomputed"] for moment in found.timeline)


def test_the_clock_runs_through_the_timeline() -> None:
    found = plan()
    assert found.timeline[0].start_us == 0
    assert all(a.end_us == b.start_us for a, b in itertools.pairwise(found.timeline))
    assert found.timeline[-1].end_us == pytest.approx(found.step_us)
    assert found.baseline_timeline[-1].end_us == pytest.approx(found.baseline_step_us)


def test_backward_ops_know_their_module() -> None:
    backward = [moment for moment in plan().timeline if moment.phase == "backward" and "mm" in moment.name]
    assert [moment.module for moment in backward][:2] == ["lm_head", "lm_head"]
    assert backward[2].module == "model.layers.3.mlp.down_proj"


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


def test_shapes_of_an_op_with_several_results() -> None:
    model = nn.Sequential(nn.EmbeddingBag(500, 32, mode="max"), nn.Linear(32, 8))
    found = remat.plan(model, (torch.randint(0, 500, (6, 4)),), budget=None)
    shapes = [a.shape for block in found.blocks for a in block.activations if "embedding_bag" in a.op]
    assert (6, 32) in shapes
    assert all(shapes)


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
    found = remat.plan(model.train(), (), kwargs, budget=None, policy="none")
    assert not found.dropped
    assert found.peak_bytes == found.baseline_peak_bytes
    assert remat.plan(model, (), kwargs, budget=found.peak_bytes, policy="none").dropped == ()
    with pytest.raises(remat.BudgetError, match=f"policy='none' needs .* \\({found.peak_bytes} bytes\\)") as caught:
        remat.plan(model, (), kwargs, budget=found.peak_bytes - 1, policy="none")
    assert caught.value.minimum_bytes == found.peak_bytes


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
