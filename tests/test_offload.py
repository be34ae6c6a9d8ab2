"""The planner with three decisions: what may wait on the host need not be computed again."""

from __future__ import annotations

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

import remat
from remat import devices
from remat.menus import make_menus
from remat.planner import smallest_solution, solve
from remat.program import Link, Op, Program
from remat.transfer import host_tier
from tests.lanes import slow_copies
from tests.models import build
from tests.programs import stack
from tests.steps import Outcome, assert_same, run_step

FAST, SLOW = Link(1000.0, 1000.0, overlaps=True), Link(4.0, 4.0, overlaps=True)


def linked(link: Link | None, blocks: int = 8) -> Program:
    """A stack whose backward can start copies before each of its ops."""
    program = stack(blocks)
    n = len(program.forward)
    return dataclasses.replace(program, link=link, moments=tuple((2 * n - 1 - p, f"f{p}") for p in range(n)))


def test_over_a_fast_link_nothing_is_computed_again() -> None:
    program = linked(FAST)
    menus, with_host = make_menus(program), make_menus(program, host_bytes=10**9)
    full = solve(menus, None).replay.peak_bytes
    budget = int(program.resident_bytes + 0.6 * (full - program.resident_bytes))
    alone, both = solve(menus, budget), solve(with_host, budget)
    assert alone.replay.recompute_us > 0
    assert (both.replay.recompute_us, both.replay.stall_us) == (0.0, 0.0)
    assert both.replay.host_bytes > 0
    assert both.replay.peak_bytes <= budget
    assert smallest_solution(with_host).replay.peak_bytes < smallest_solution(menus).replay.peak_bytes


@pytest.mark.parametrize("link", [FAST, SLOW, Link(50.0, 25.0, overlaps=True), Link(50.0, 50.0, overlaps=False)])
def test_more_host_memory_never_costs_time(link: Link) -> None:
    program = linked(link)
    full = solve(make_menus(program), None).replay.peak_bytes
    for share in (0.8, 0.5):
        budget = int(program.resident_bytes + share * (full - program.resident_bytes))
        added = []
        for host_bytes in (0, 300, 10**9):
            solution = solve(make_menus(program, host_bytes), budget)
            assert solution.replay.peak_bytes <= budget
            assert solution.replay.host_bytes <= host_bytes
            added.append(solution.replay.added_us)
        assert added[2] <= added[0] * 1.05


def test_where_there_is_room_nothing_moves() -> None:
    program = linked(FAST)
    menus = make_menus(program, host_bytes=10**9)
    assert not solve(menus, None).moves
    assert not solve(menus, solve(menus, None).replay.peak_bytes).moves


def test_small_values_are_not_worth_a_copy() -> None:
    program = linked(Link(1000.0, 1000.0, overlaps=True, start_us=1.0))  # no value has 1000 bytes
    budget = program.resident_bytes + 700
    assert not solve(make_menus(program, host_bytes=10**9), budget).moves


def test_the_error_names_the_way_out() -> None:
    program = linked(FAST)
    with pytest.raises(remat.BudgetError, match="host_budget="):
        solve(make_menus(program), program.resident_bytes)
    without = dataclasses.replace(program, link=None, backward=(*program.backward, Op("end", 0.0, 0)))
    with pytest.raises(remat.BudgetError) as error:
        solve(make_menus(without), program.resident_bytes)
    assert "host_budget" not in str(error.value)


@pytest.fixture
def _overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as for a device with a link of its own."""
    link = Link(6e3, 6e3, overlaps=True, start_us=3.0)
    monkeypatch.setattr(devices, "CPU", dataclasses.replace(devices.CPU, link=link))


@functools.cache
def unchanged(name: str) -> Outcome:
    model, kwargs = build(name)
    return run_step(remat.optimize(model, (), kwargs, budget=None), kwargs)


@pytest.mark.usefixtures("_overlapping")
@pytest.mark.parametrize(
    ("name", "share"), [("gpt2", 0.0), ("gpt2", 0.5), pytest.param("t5", 0.5, marks=pytest.mark.slow), ("convnext", 0.0)]
)
def test_a_budget_holds_with_values_on_the_host(name: str, share: float) -> None:
    model, kwargs = build(name)
    frontier = remat.frontier(model, (), kwargs, host_budget="1GiB", points=3)
    least, most = frontier[-1].peak_bytes, frontier[0].peak_bytes
    budget = int(least + share * (most - least))
    module = remat.optimize(model, (), kwargs, budget=budget, host_budget="1GiB")
    outcome = run_step(module, kwargs)
    assert_same(outcome, unchanged(name))
    assert module.plan is not None
    assert module.plan.host_bytes > 0
    assert outcome.peak_bytes <= module.plan.peak_bytes <= budget
    assert module.plan.peak_bytes / outcome.peak_bytes <= 1.01
    assert module.plan.step_us == pytest.approx(module.plan.baseline_step_us + module.plan.recompute_us + module.plan.stall_us)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_every_copy_back_starts_before_it_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's rates: values that leave late overlap with later blocks."""
    expected = unchanged(name)
    monkeypatch.setattr(devices, "CPU", dataclasses.replace(devices.CUDA, name="cpu"))
    model, kwargs = build(name)
    module = remat.optimize(model, (), kwargs, budget=None, policy="offload-all")
    outcome = run_step(module, kwargs)
    assert_same(outcome, expected)
    assert module.plan is not None
    assert all(transfer.reload for transfer in module.plan.transfers)
    assert 1 <= module.plan.peak_bytes / outcome.peak_bytes <= 1.01


def test_too_little_host_memory_is_named_as_what_binds() -> None:
    program = linked(FAST)
    with_host = make_menus(program, host_bytes=10**9)
    budget = smallest_solution(with_host).replay.peak_bytes
    with pytest.raises(remat.BudgetError, match=r"Raise host_budget=") as error:
        solve(make_menus(program, host_bytes=1), budget)
    assert error.value.where == "host memory"
    assert error.value.budget_bytes == 1
    needed = error.value.minimum_bytes
    assert needed is not None
    assert solve(make_menus(program, host_bytes=needed), budget).replay.peak_bytes <= budget


@pytest.mark.slow
@pytest.mark.usefixtures("_overlapping")
def test_a_host_budget_is_kept() -> None:
    model, kwargs = build("gpt2")
    free = remat.plan(model, (), kwargs, budget=0.6, host_budget="1GiB")
    tight = remat.plan(model, (), kwargs, budget=0.6, host_budget=free.host_bytes // 2)
    none = remat.plan(model, (), kwargs, budget=0.6, host_budget=0)
    assert 0 < tight.host_bytes <= free.host_bytes // 2
    assert none.host_bytes == 0
    assert free.recompute_us <= tight.recompute_us <= none.recompute_us


def test_a_model_on_the_host_moves_nothing_unless_asked_to() -> None:
    model, kwargs = build("gpt2")
    assert remat.plan(model, (), kwargs, budget=0.5).host_bytes == 0


@pytest.mark.parametrize("host_budget", [-1, "8 potatoes", float("nan"), True, 0.5, "auto", [1]])
def test_a_host_budget_that_cannot_be_read(host_budget: object) -> None:
    with pytest.raises(remat.BudgetError):
        remat.optimize(torch.nn.Linear(2, 2), budget=None, host_budget=host_budget)  # type: ignore[arg-type]


def test_a_policy_that_needs_more_of_the_host() -> None:
    model, kwargs = build("llama")
    needs = remat.plan(model, (), kwargs, budget=None, policy="offload-all").host_bytes
    assert remat.plan(model, (), kwargs, budget=None, policy="offload-all", host_budget=needs).host_bytes == needs
    with pytest.raises(remat.BudgetError, match="host memory") as error:
        remat.plan(model, (), kwargs, budget=None, policy="offload-all", host_budget=needs - 1)
    assert (error.value.minimum_bytes, error.value.where) == (needs, "host memory")


@pytest.mark.usefixtures("_overlapping", "_dynamo")
def test_a_budget_holds_in_compiled_graphs_with_values_on_the_host() -> None:
    def through(budget: int | None, host_budget: str | int) -> tuple[Outcome, remat.CompiledPlan]:
        torch._dynamo.reset()
        model, kwargs = build("gpt2")
        options = {"budget": budget, "host_budget": host_budget, "compiler": "eager"}
        step = torch.compile(model, backend="remat", options=options)
        return run_step(step, kwargs), remat.plans(step)[0]

    expected, everything = through(None, 0)
    budget = everything.plan.peak_bytes * 2 // 3
    _, alone = through(budget, 0)
    outcome, both = through(budget, "1GiB")
    assert_same(outcome, expected)
    assert outcome.peak_bytes <= both.plan.peak_bytes <= budget
    assert both.plan.peak_bytes / outcome.peak_bytes <= 1.01
    assert both.plan.host_bytes > 0
    assert both.plan.recompute_us + both.plan.stall_us < alone.plan.recompute_us
    assert "torch.ops.remat.offload" in both.forward.code
    assert both.forward.code.count("remat.release") == both.forward.code.count("remat.offload")
    assert "torch.ops.remat.reload" in both.backward.code
    assert any(transfer.reload for transfer in both.plan.transfers)


def test_the_ops() -> None:
    x = torch.randn(3, 4, 5).permute(2, 0, 1)
    torch.library.opcheck(torch.ops.remat.offload.default, (x, x.stride()), test_utils=("test_schema", "test_faketensor"))
    for stride in (x.stride(), (12, 4, 1)):
        host = torch.ops.remat.offload(x, stride)
        assert host.shape == (60,)
        back = torch.ops.remat.reload(host, x.shape, stride, x.device)
        torch.ops.remat.wait(back)
        assert torch.equal(back, x)
        assert back.stride() == stride
    pool = host_tier(x.device).pool
    held = pool.in_use_bytes
    del host
    assert pool.in_use_bytes == held - x.nbytes


def soon(true: Callable[[], bool]) -> bool:
    """The thread that copied lets go of the tensor a moment after it says that it is done."""
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.001)
    return true()


@pytest.fixture
def _slow() -> Iterator[None]:
    with slow_copies(torch.device("cpu"), 0.05):
        yield


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.usefixtures("_slow")
def test_a_tensor_stays_until_it_is_released(released: bool) -> None:
    x = torch.randn(1000)
    gone, expected = weakref.ref(x.untyped_storage()), x.clone()
    host = torch.ops.remat.offload(x, x.stride())
    if released:
        torch.ops.remat.release(x, host)
    del x
    if released:
        assert soon(lambda: gone() is None)
    else:
        assert gone() is not None
    back = torch.ops.remat.reload(host, expected.shape, expected.stride(), expected.device)
    assert soon(lambda: gone() is None)
    torch.ops.remat.wait(back)
    assert torch.equal(back, expected)


@pytest.mark.usefixtures("_dynamo")
def test_nothing_moves_of_an_empty_batch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
    step = torch.compile(model, backend="remat", options={"compiler": "eager", "policy": "offload-all"})
    step(torch.randn(0, 4)).sum().backward()
    assert model[0].weight.grad is not None
    assert not remat.plans(step)[0].plan.host_bytes
