"""What a person writes as a budget, and the bytes it means."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat import budget as budgets
from remat import host_memory
from remat.budget import Budget, format_bytes, memory_of, parse_budget, parse_host_budget, resolve_budget
from remat.session import Options
from tests.models import mlp

CPU = torch.device("cpu")
GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1GiB", GIB),
        ("1 GB", 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("24gib", 24 * GIB),
        (" 24 GiB ", 24 * GIB),
        ("512MiB", 512 * 1024**2),
        ("300 kb", 300_000),
        ("300KiB", 300 * 1024),
        ("2TB", 2 * 10**12),
        ("100B", 100),
    ],
)
def test_sizes(text: str, amount: int) -> None:
    assert parse_budget(text) == Budget(bytes=amount)


@pytest.mark.parametrize(
    ("budget", "meaning"),
    [
        (None, Budget()),
        (1, Budget(bytes=1)),
        (0.5, Budget(share_of_activations=0.5)),
        (1.0, Budget(share_of_activations=1.0)),
        ("80%", Budget(share_of_device=0.8)),
        ("12.5 %", Budget(share_of_device=0.125)),
        ("auto", Budget(auto=True)),
        (" AUTO ", Budget(auto=True)),
    ],
)
def test_other_forms(budget: budgets.BudgetLike, meaning: Budget) -> None:
    assert parse_budget(budget) == meaning


@given(st.integers(1, 10**15))
def test_a_size_in_an_error_is_enough_as_a_budget(needed: int) -> None:
    shown = budgets.format_needed(needed)
    assert shown.endswith(f" ({needed} bytes)")
    found = parse_budget(shown.partition(" (")[0]).bytes
    assert found is not None
    assert needed <= found <= max(needed + 11, 1.011 * needed)


@given(st.integers(1, 10**15))
def test_bytes_are_taken_as_they_are(amount: int) -> None:
    assert resolve_budget(parse_budget(amount), memory_of(CPU), 0, 1) == amount


@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.booleans(), st.none()))
def test_anything_else_is_a_budget_error(budget: budgets.BudgetLike) -> None:
    try:
        read = parse_budget(budget)
    except remat.BudgetError as error:
        assert "use bytes as an int" in str(error)
    else:
        given = [value for value in dataclasses.astuple(read) if value]
        assert len(given) == (budget is not None)
        assert all(amount > 0 for amount in given)


def test_a_share_is_of_what_lies_above_resident_memory() -> None:
    assert resolve_budget(Budget(share_of_activations=0.25), memory_of(CPU), 1000, 5000) == 2000


def test_a_percentage_is_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "device_bytes", lambda device: 1000)
    assert resolve_budget(Budget(share_of_device=0.8), memory_of(CPU), 10, 20) == 800


def test_auto_is_what_is_free_and_what_is_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 1000)
    assert resolve_budget(Budget(auto=True), memory_of(CPU, 50), 80, 20) == 1050
    monkeypatch.setattr(budgets, "device_bytes", lambda device: 1020)
    assert resolve_budget(Budget(auto=True), memory_of(CPU, 50), 80, 20) == 1020


def test_tensors_that_modules_hold_count() -> None:
    """As attributes of another kind; once, where it is a parameter's storage."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)).train()
    x = torch.randn(4, 16)
    plain = remat.plan(model, (x,), budget=None)
    model[0].tied = model[1].weight.detach()
    model[0].computed = computed = torch.randn(64, 64)
    found = remat.plan(model, (x,), budget=None)
    assert found.resident_bytes == plain.resident_bytes + computed.nbytes
    assert remat.verify(remat.optimize(model, (x,), budget=None), args=(x,)).holds


@pytest.mark.parametrize("through", ["whole", "blocks"])
def test_auto_does_not_count_what_is_yet_to_come(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an optimizer's state nor gradients of forwards in flight are there before the first step."""
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 10**6)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    x = torch.randn(4, 16)
    parameters, inputs = sum(p.nbytes for p in model.parameters()), x.nbytes
    optimizer = torch.optim.AdamW(model.parameters())

    def budget(**settings: Any) -> int | None:
        if through == "whole":
            return remat.plan(model, (x,), budget="auto", **settings).budget_bytes
        plan = remat.plan_of(remat.optimize_blocks(model, (x,), budget="auto", **settings))
        remat.disable(model)
        return plan.budget_bytes if plan is not None else None

    assert budget() == budget(in_flight=2) == budget(optimizer=optimizer) == 10**6 + parameters + inputs
    model(x).sum().backward()
    optimizer.step()
    assert budget() == 10**6 + 2 * parameters + inputs
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert budget(optimizer=optimizer) == 10**6 + 2 * parameters + inputs + state


def test_a_model_without_memory_has_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda device: 10**6)
    with torch.device("meta"):
        model, x = torch.nn.Linear(16, 16), torch.randn(4, 16)
    assert remat.plan(model, (x,), budget="auto", device="cpu").budget_bytes == 10**6


def test_settings_are_read_without_a_look_at_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise AssertionError("asked for memory")

    monkeypatch.setattr(host_memory, "available_bytes", fail)
    remat.optimize(torch.nn.Linear(2, 2), budget="auto", host_budget="50%")
    Options.read({"budget": "auto", "host_budget": "50%"})


def test_none_allows_any_peak() -> None:
    assert resolve_budget(Budget(), memory_of(CPU), 10, 20) is None


def test_the_machine_has_memory() -> None:
    assert 0 < budgets.free_bytes(CPU) <= budgets.device_bytes(CPU)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (6 * GIB, "6.00 GiB"), (3 * 1024**4, "3.00 TiB")],
)
def test_formatting(amount: int, text: str) -> None:
    assert format_bytes(amount) == text


@given(st.integers(1, 2**50))
def test_what_is_printed_can_be_read(amount: int) -> None:
    read = parse_budget(format_bytes(amount)).bytes
    assert read is not None
    assert abs(read - amount) <= 0.006 * amount


@pytest.mark.parametrize(
    ("host_budget", "meaning"),
    [
        (None, Budget()),
        (0, Budget(bytes=0)),
        ("0GiB", Budget(bytes=0)),
        ("1KiB", Budget(bytes=1024)),
        ("100%", Budget(None, 1.0)),
    ],
)
def test_host_budgets(host_budget: int | str | None, meaning: Budget) -> None:
    assert parse_host_budget(host_budget) == meaning


@pytest.mark.parametrize("host_budget", [-1, "8 potatoes", "150%", float("nan"), True, 0.5, "auto", [1]])
def test_an_error_speaks_of_its_argument(host_budget: Any) -> None:
    with pytest.raises(remat.BudgetError, match=r'^host_budget=.*; use bytes as an int, "64GiB", "64GB", "50%" of') as error:
        parse_host_budget(host_budget)
    assert "activation" not in str(error.value)


def test_no_more_than_all_of_the_device() -> None:
    assert parse_budget("100%") == Budget(share_of_device=1.0)
    with pytest.raises(remat.BudgetError, match=r"^budget='150%' is more than all of it; use"):
        parse_budget("150%")


@pytest.mark.parametrize("whole_model", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_plan_is_for_training_wherever_it_is_made(mode: Any, whole_model: bool) -> None:
    make = remat.optimize if whole_model else remat.optimize_blocks
    plans = []
    for around in (torch.enable_grad, mode):
        model, x = mlp()
        with around():
            optimized = make(model, (x,), budget=0.6)
        plans.append(remat.plan_of(optimized))
        optimized(x).backward()
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].dropped
    assert plans[1].peak_bytes == plans[0].peak_bytes


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = nn.functional.dropout((query @ key.mT).softmax(-1), 0.1)
        return x + self.out((weights @ value).transpose(1, 2).reshape(x.shape))


class _Attentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head, self.checkpoints = nn.ModuleList(_Attention() for _ in range(6)), nn.Linear(32, 1), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        return self.head(x).square().mean()


def test_the_smallest_budget_is_below_what_checkpointing_each_block_takes() -> None:
    """What helps there is not among the ten cheapest groups of values."""
    model, x = _Attentions(), torch.randn(4, 96, 32)
    with pytest.raises(remat.BudgetError) as error:
        remat.plan(model, (x,), budget=1)
    assert error.value.minimum_bytes is not None
    model.checkpoints = True
    assert error.value.minimum_bytes < remat.measure(lambda: model(x).backward()).peak_bytes
