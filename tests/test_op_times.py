"""Times of ops as measured, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import remat
from remat import op_times
from remat.op_times import OpTimes
from remat.workspace import Call
from tests.models import mlp
from tests.steps import assert_same_gradients, gradients_of

aten, CPU = torch.ops.aten, torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    op_times.op_times.cache_clear()
    yield tmp_path / "remat"
    op_times.op_times.cache_clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that are timed."""
    timed: list[str] = []
    measured = op_times._measured

    def note(call: Call, device: torch.device) -> float | None:
        timed.append(str(call.op))
        return measured(call, device)

    monkeypatch.setattr(op_times, "_measured", note)
    return timed


def product(size: int) -> Call:
    call = Call.of(aten.mm.default, (torch.empty(size, size), torch.empty(size, size)), {})
    assert call is not None
    return call


def test_an_op_is_timed_once_and_remembered_by_later_processes(folder: Path, runs: list[str]) -> None:
    first = OpTimes(CPU)
    small, large = (first.time_us(product(size), 0.0) for size in (8, 512))
    assert 0 < small < large
    assert first.time_us(product(512), 0.0) == large
    first.save()
    assert OpTimes(CPU).time_us(product(512), 0.0) == large
    assert runs == ["aten.mm.default"] * 2
    (file,) = folder.iterdir()
    assert [key.split()[0] for key in json.loads(file.read_text())] == ["aten.mm.default"] * 2


def test_what_others_wrote_meanwhile_is_kept(folder: Path, runs: list[str]) -> None:
    first, second = OpTimes(CPU), OpTimes(CPU)
    first.time_us(product(8), 0.0), second.time_us(product(16), 0.0)
    first.save(), second.save()
    third = OpTimes(CPU)
    third.time_us(product(8), 0.0), third.time_us(product(16), 0.0)
    assert len(runs) == 2


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_broken_file_is_measured_anew(text: str, folder: Path, runs: list[str]) -> None:
    folder.mkdir()
    times = OpTimes(CPU)
    times.path.write_text(text)
    assert OpTimes(CPU).time_us(product(8), 0.0) > 0


def test_an_op_that_does_not_run_on_random_numbers_has_its_estimate(folder: Path) -> None:
    call = Call.of(aten.mm.default, (torch.empty(2, 3), torch.empty(2, 3)), {})
    assert call is not None
    assert OpTimes(CPU).time_us(call, 12.5) == 12.5


def test_timing_leaves_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    OpTimes(CPU).time_us(product(8), 0.0)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.usefixtures("_dynamo")
def test_plans_use_measured_times(door: int, folder: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_times, "_on_cpu", lambda run: 1000.0)
    model, x = mlp()

    def planned(**settings: Any) -> tuple[remat.Plan, dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        if door == 1:
            module = remat.optimize(model, (x,), **settings)
            return module.plan, gradients_of(module, x)
        compiled = torch.compile(model, backend="remat", options={"compiler": "eager", **settings})
        gradients = gradients_of(compiled, x)
        return remat.plans(compiled)[0].plan, gradients

    plan, gradients = planned(budget=0.6, costs="measured")
    assert plan.baseline_step_us % 1000.0 == 0.0
    assert plan.baseline_step_us > 1000.0
    timed = len(runs)
    again, _ = planned(budget=0.6, costs="measured")
    assert (again.decisions, len(runs)) == (plan.decisions, timed)
    assert_same_gradients(gradients, planned(budget=None)[1])


def test_unknown_costs_are_refused() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match=r"costs='guessed' is unknown; there are 'analytic', 'measured'"):
        remat.optimize(model, (x,), budget=None, costs="guessed")
    with pytest.raises(remat.RematError, match="needs the device itself"):
        remat.plan(model, (x,), budget=None, costs="measured", device="h100")
