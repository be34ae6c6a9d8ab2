"""Ops that run a graph of their own, through door 2: what happens in them counts, and marked regions are planned as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops import scan, while_loop

import remat
from remat.devices import CPU
from remat.passes.subgraphs import subgraph_bytes
from tests.steps import assert_close_gradients, assert_same, assert_same_gradients, refused, run_step

pytestmark = pytest.mark.usefixtures("_dynamo")


@torch.library.custom_op("remat_tests::shift_", mutates_args=("x",))
def shift_(x: torch.Tensor) -> None:
    x.add_(1)


class Gate(nn.Module):
    """The batch decides which of two branches runs; either has intermediates of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(32, 128), nn.Linear(128, 32), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dropout(torch.nn.functional.gelu(self.up(x)))
        return x + torch.cond(x.mean() > 10, lambda h: self.down(h), lambda h: torch.tanh(self.down(h * h.sigmoid())), (h,))


class Gates(nn.Module):
    def __init__(self, count: int, dropout: float) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate(dropout) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.zeros(4)
        for gate in self.gates:
            x = gate(x)
            shift_(steps)
        return x.square().mean() * steps.sum()


def compiled(model: Any, budget: Any = None, compiler: str = "eager") -> Any:
    return torch.compile(model, backend="remat", options={"budget": budget, "compiler": compiler})


def smallest(model: nn.Module, compiler: str, **kwargs: Any) -> int:
    error = refused(compiled(model, 1, compiler), **kwargs)
    assert isinstance(error, remat.BudgetError)
    assert error.minimum_bytes is not None
    torch._dynamo.reset()
    return error.minimum_bytes


def test_branches_within_the_smallest_budget() -> None:
    model, kwargs = Gates(3, dropout=0.1), {"x": torch.randn(256, 16, 32)}
    expected = run_step(model, kwargs)
    budget = smallest(model, "eager", **kwargs)
    module = compiled(model, budget)
    outcome = run_step(module, kwargs)
    assert_same(outcome, expected)
    (graph,) = remat.plans(module)
    assert graph.plan.dropped
    assert outcome.peak_bytes <= budget < 0.7 * expected.peak_bytes


class Loop(nn.Module):
    """`kind` of a loop, or of a branch, with results that nobody reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.linspace(-1, 1, 2**14))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "cond":
            sides = (lambda x: (x * self.weight, x * 2)), lambda x: (x.sin() * self.weight, x.cos())
            return torch.cond(x.sum() > 0, *sides, (x,))[0].square().sum()
        if self.kind == "scan":
            carried, found = scan(self._step, torch.zeros(2**14), x)
            return carried.sum() + found.square().sum()
        with torch.no_grad():
            _, h = while_loop(lambda i, h: i < 6, lambda i, h: (i + 1, torch.tanh(h / 2 + x)), (torch.tensor(0), x.cos()))
        return (h * self.weight).sum()

    def _step(self, carried: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        following = torch.tanh(carried * self.weight + x)
        return following, following * 2


@pytest.mark.parametrize("kind", ["cond", "scan", "while_loop"])
def test_what_loops_hold_and_nobody_reads(kind: str) -> None:
    model, kwargs = Loop(kind), {"x": torch.randn(8, 2**14)}
    module = compiled(model)
    outcome = run_step(module, kwargs)
    (graph,) = remat.plans(module)
    assert 0.95 < outcome.peak_bytes / graph.plan.peak_bytes <= 1
    assert_close_gradients(outcome.gradients, run_step(model, kwargs).gradients, 1e-5)


@pytest.mark.slow
def test_branches_through_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, kwargs = Gates(1, dropout=0.0), {"x": torch.randn(256, 16, 32)}
    expected = run_step(model, kwargs)
    module = compiled(model, None, "inductor")
    outcome = run_step(module, kwargs)
    (graph,) = remat.plans(module)
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-5)
    assert abs(graph.plan.peak_bytes / outcome.peak_bytes - 1) <= 0.01


def test_what_branches_allocate_beyond_their_results() -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.view.default(torch.ops.aten.sin.default(torch.ops.aten.cos.default(x)), [-1])

    x = torch.randn(4, 64)
    root = nn.Module()
    root.branch = _with_values(fx.symbolic_trace(branch), x)
    graph = fx.Graph()
    given, inside = graph.placeholder("x"), graph.get_attr("branch")
    call = graph.call_function(torch.ops.higher_order.cond, (True, inside, inside, (given,)))
    graph.output(call)
    root.outer = fx.GraphModule(root, graph)
    assert subgraph_bytes(call, CPU.allocated_bytes) == x.nbytes  # of cos; that of sin is the result


def _with_values(gm: fx.GraphModule, x: torch.Tensor) -> fx.GraphModule:
    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Keeping(gm).run(x)
    return gm


# ---- regions that are marked to be compiled once ----


@torch.compiler.nested_compile_region
def inner(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = layer(x)
    return h, torch.cond(h.mean() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))


@torch.compiler.nested_compile_region
def region(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    first, second = inner(layer, x)
    return first + second


class Regions(nn.Module):
    def __init__(self, is_marked: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, 0.1, batch_first=True) for _ in range(3))
        self.is_marked = is_marked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = region(layer, x) if self.is_marked else _unmarked(layer, x)
        return x.square().mean()


def _unmarked(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = layer(x)
    return h + torch.cond(h.mean() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))


def test_marked_regions_are_planned_as_one_graph() -> None:
    model, plain = Regions(True), Regions(False)
    plain.load_state_dict(model.state_dict())
    kwargs = {"x": torch.randn(16, 16, 32)}
    expected = run_step(plain, kwargs)
    plans = []
    for each in (model, plain):
        module = compiled(each, 0.6)
        outcome = run_step(module, kwargs)
        (graph,) = remat.plans(module)
        plans.append(graph.plan)
        assert_same_gradients(outcome.gradients, expected.gradients)
        torch._dynamo.reset()
    marked, unmarked = plans
    assert marked.dropped
    assert (marked.peak_bytes, len(marked.dropped)) == (unmarked.peak_bytes, len(unmarked.dropped))
