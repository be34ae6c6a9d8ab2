"""Door 2 with plain FX graphs: on every model the gradients of the unplanned step, within the budget."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat import compilation
from tests.models import EACH_MODEL, Mlp, Weighted, build, mlp
from tests.steps import (
    Outcome,
    assert_close_gradients,
    assert_same,
    assert_same_gradients,
    gradients_of,
    refused,
    run_step,
)

pytestmark = pytest.mark.usefixtures("_dynamo")


def compiled(model: nn.Module, budget: Any = None, **options: Any) -> Any:
    return torch.compile(model, backend="remat", options={"budget": budget, "compiler": "eager", **options})


# ---- every model ----


@dataclass(frozen=True)
class Reference:
    """The step without a budget, and the smallest budget that works."""

    outcome: Outcome
    peak_bytes: int
    minimum_bytes: int


@functools.cache
def reference(name: str) -> Reference:
    model, kwargs = build(name)
    module = compiled(model)
    outcome = run_step(module, kwargs)
    (graph,) = remat.plans(module)
    torch._dynamo.reset()
    error = refused(compiled(model, budget=1), **kwargs)
    assert isinstance(error, remat.BudgetError)
    assert error.minimum_bytes is not None
    torch._dynamo.reset()
    return Reference(outcome, graph.plan.peak_bytes, error.minimum_bytes)


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)], ids=["smallest", "middle"])
@pytest.mark.parametrize("name", EACH_MODEL)
def test_a_budget_holds_and_changes_nothing(name: str, share: float) -> None:
    found = reference(name)
    budget = int(found.minimum_bytes + share * (found.peak_bytes - found.minimum_bytes))
    model, kwargs = build(name)
    module = compiled(model, budget)
    outcome = run_step(module, kwargs)
    assert_same(outcome, found.outcome)
    assert outcome.peak_bytes <= budget
    (graph,) = remat.plans(module)
    assert graph.plan.budget_bytes == budget
    assert graph.plan.peak_bytes <= budget
    assert outcome.peak_bytes >= 0.97 * graph.plan.peak_bytes


@pytest.mark.parametrize("name", ["llama", "vit", "resnet"])
def test_without_dropout_gradients_are_those_of_the_original(name: str) -> None:
    model, kwargs = build(name)
    expected = run_step(model, kwargs)
    assert_close_gradients(reference(name).outcome.gradients, expected.gradients, 1e-5)
    assert reference(name).outcome.output_type is expected.output_type


def test_constants_that_ops_bring_along_are_in_the_plan() -> None:
    module = compiled(Weighted())
    found = run_step(module, {"x": torch.randn(512, 128)})
    (graph,) = remat.plans(module)
    assert found.peak_bytes <= graph.plan.peak_bytes < 1.01 * found.peak_bytes


# ---- options ----


def test_unknown_options_are_listed_with_the_known_ones() -> None:
    model, x = mlp()
    error = refused(torch.compile(model, backend="remat", options={"budgett": 1}), x)
    for word in ("budgett", "budget", "compiler", "policy"):
        assert repr(word) in str(error)
    assert "torch._inductor.config" in str(error)


def test_other_values_are_refused() -> None:
    model, x = mlp()
    assert "'eager'" in str(refused(compiled(model, compiler="nvcc"), x))
    assert "'auto'" in str(refused(compiled(model, policy="fast"), x))
    assert isinstance(refused(compiled(model, budget="8 potatoes"), x), remat.BudgetError)


def test_a_mode_is_refused() -> None:
    model, x = mlp()
    assert "options" in str(refused(torch.compile(model, backend="remat", mode="max-autotune"), x))


def test_backward_within_the_compiled_function_is_refused_where_it_is_traced() -> None:
    model, x = mlp()

    def step(x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(model(x).sum(), [next(model.parameters())])
        return gradient

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        error = refused(compiled(step), x)  # type: ignore[arg-type]
    assert isinstance(error, remat.CaptureError)
    assert "trace_autograd_ops" in str(error)


def test_a_budget_nobody_can_meet_says_so() -> None:
    model, x = mlp()
    error = refused(compiled(model, budget=1000), x)
    assert isinstance(error, remat.BudgetError)
    assert error.budget_bytes == 1000
    assert error.where
    assert str(error.minimum_bytes) in str(error)


def test_the_policy_none_saves_everything() -> None:
    model, x = mlp()
    module = compiled(model, budget=None, policy="none")
    module(x).backward()
    plan = remat.plans(module)[0].plan
    assert not plan.dropped
    torch._dynamo.reset()
    error = refused(compiled(model, budget=1000, policy="none"), x)
    assert isinstance(error, remat.BudgetError)
    assert error.budget_bytes == 1000
    assert "policy='none' needs" in str(error)


@pytest.mark.parametrize("budget", [0.8, "1GiB", "50%", "auto"])
def test_budgets_in_any_form(budget: Any) -> None:
    model, x = mlp()
    module = compiled(model, budget)
    module(x).backward()
    (graph,) = remat.plans(module)
    assert graph.plan.peak_bytes <= graph.plan.budget_bytes  # type: ignore[operator]


def test_no_import_of_remat_is_needed() -> None:
    program = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
compiled = torch.compile(model, backend="remat", options={"budget": "1GiB", "compiler": "eager"})
compiled(torch.ones(2, 8)).sum().backward()
assert model[0].weight.grad is not None
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


# ---- plans ----


def test_plans_show_what_was_decided_and_the_graphs_that_run() -> None:
    model, x = mlp()
    module = compiled(model, 0.8)
    assert remat.plans(module) == []
    module(x).backward()
    (graph,) = remat.plans(module)
    assert isinstance(graph, remat.CompiledPlan)
    assert graph.plan.door == "compiled"
    assert graph.plan.dropped
    assert remat.Plan.from_json(graph.plan.to_json()) == graph.plan
    assert "recompute" in graph.plan.summary()
    names = {node.name for node in graph.backward.graph.nodes}
    again = {moment.name for moment in graph.plan.timeline if moment.phase == "recompute"}
    assert again
    assert again <= names
    for half in (graph.forward, graph.backward):
        half.graph.lint()
        assert "def forward" in half.print_readable(print_output=False)


def test_what_is_read_as_a_matrix_is_saved_as_one() -> None:
    """The dropout's result is; its mask and what tanh returns are read as images by their gradients."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8))
    images = torch.randn(4, 3, 8, 8)
    module = compiled(model)
    module(images).sum().backward()
    (graph,) = remat.plans(module)
    saved = [
        node for node in graph.backward.graph.find_nodes(op="placeholder") if not node.name.startswith(("primals", "tangents"))
    ]
    assert sorted(tuple(node.meta["val"].shape) for node in saved) == [(4, 8, 8, 8), (4, 8, 8, 16), (256, 16)]


class Strided(nn.Module):
    """Its gradient is written to a part of a tensor of zeros, through a view of that."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).as_strided((10, 10), (48, 1), 3).exp().mean()


def test_what_is_written_through_a_view_copies_all_that_is_viewed() -> None:
    module = compiled(Strided())
    outcome = run_step(module, {"x": torch.randn(256, 48)})
    (graph,) = remat.plans(module)
    assert 0.95 * graph.plan.peak_bytes <= outcome.peak_bytes <= graph.plan.peak_bytes


def test_plans_of_something_else() -> None:
    model, _x = mlp()
    for other in (model, torch.compile(model, backend="eager"), torch.compile(model, backend="aot_eager")):
        with pytest.raises(remat.RematError, match='backend="remat"'):
            remat.plans(other)


def test_plans_of_a_compiled_function() -> None:
    model, x = mlp()

    @torch.compile(backend="remat", options={"compiler": "eager"})
    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x) * 2

    loss(x).backward()
    assert len(remat.plans(loss)) == 1


class Doubled(Mlp):
    """Another class: Dynamo runs the code of one model for another of the same class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_models_that_share_their_options_have_their_own_plans(caplog: pytest.LogCaptureFixture) -> None:
    options, x = {"budget": 0.8, "compiler": "eager"}, torch.randn(64, 32)
    alone = compiled(Doubled().train(), 0.8)
    alone(x).backward()
    peak = remat.plans(alone)[0].plan.peak_bytes
    torch._dynamo.reset()
    modules = [torch.compile(kind().train(), backend="remat", options=options) for kind in (Mlp, Doubled)]
    for module in modules:
        module(x).backward()
    plans = [remat.plans(module) for module in modules]
    assert [len(found) for found in plans] == [1, 1]
    assert plans[1][0].plan.peak_bytes == peak
    assert "graph breaks" not in caplog.text


class Sum(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((part(x) for part in self.parts), torch.zeros(()))


def test_blocks_compiled_one_by_one_share_the_budget_of_their_options() -> None:
    options, x = {"budget": "1GiB", "compiler": "eager"}, torch.randn(64, 32)
    first, second = Mlp().train(), Doubled().train()
    for block in (first, second):
        block.compile(backend="remat", options=options)
    model = Sum(first, second)
    model(x).backward()
    (before,), (after,) = remat.plans(first), remat.plans(second)
    assert after.plan.resident_bytes == before.plan.resident_bytes + before.plan.saved_bytes  # the blocks are of one size


@pytest.mark.parametrize("budget", ["tight", "wide", 0.6])
def test_steps_that_add_to_gradients(budget: Any) -> None:
    """A budget in bytes is kept with them; code is made again only where that takes other code."""
    torch.manual_seed(0)
    model, x = Mlp().train(), torch.randn(128, 32)
    plain = compiled(copy.deepcopy(model))
    plain(x)
    (everything,) = remat.plans(plain)
    of_gradients = sum(p.nbytes for p in model.parameters())
    if isinstance(budget, str):
        budget = everything.plan.peak_bytes + (2 * of_gradients if budget == "wide" else 0)
    torch._dynamo.reset()
    module, expected = compiled(copy.deepcopy(model), budget), copy.deepcopy(model)

    def step(model: Any) -> None:
        torch.manual_seed(1)
        model(x).backward()

    for _ in range(2):
        step(module)
        peak = remat.measure(lambda: step(module)).peak_bytes
        step(expected), step(expected)
        for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
        assert peak <= budget or isinstance(budget, float)
        module.zero_grad(), expected.zero_grad()
    assert len(remat.plans(module)) == (2 if budget == everything.plan.peak_bytes else 1)


# ---- several graphs ----


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_other_shapes_are_planned_again(dynamic: bool | None) -> None:
    model, _ = mlp()
    x = torch.randn(128, 32)
    module = torch.compile(model, backend="remat", options={"budget": 0.8, "compiler": "eager"}, dynamic=dynamic)
    for rows in (64, 128, 64):
        module(x[:rows])
        found = gradients_of(module, x[:rows])
        assert {n.removeprefix("_orig_mod."): g.shape for n, g in found.items()} == {
            n: p.shape for n, p in model.named_parameters()
        }
    small, large, *again = remat.plans(module)
    assert len(again) == (dynamic is None)  # the first size came before Dynamo knew that it changes
    assert small.plan.peak_bytes < large.plan.peak_bytes
    assert small.plan.dropped


class Leaky(nn.Module):
    """Of the two gradients that prelu's backward makes nobody reads the second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("slope", torch.tensor([0.2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.prelu(self.linear(x), self.slope).mean()


def test_results_that_nobody_reads_count() -> None:
    module = compiled(Leaky())
    peak = run_step(module, {"x": torch.randn(512, 32)}).peak_bytes
    (graph,) = remat.plans(module)
    assert 0.97 * graph.plan.peak_bytes <= peak <= graph.plan.peak_bytes


class Broken(nn.Module):
    """A graph break between two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss, x = self.first(x), self.first.layers[0](x)
        torch._dynamo.graph_break()
        return loss + self.second(x)


def test_graphs_of_one_model_share_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Broken().train(), torch.randn(64, 32)
    reference = compiled(copy.deepcopy(model))
    expected = run_step(reference, {"x": x})
    first, second = remat.plans(reference)
    assert second.plan.resident_bytes > first.plan.saved_bytes
    unconstrained = max(first.plan.peak_bytes, second.plan.peak_bytes)
    torch._dynamo.reset()
    budget = int(0.85 * unconstrained)
    module = compiled(model, budget)
    outcome = run_step(module, {"x": x})
    assert_same(outcome, expected)
    assert outcome.peak_bytes <= budget
    assert len(remat.plans(module)) == 2
    assert sum("what runs outside of its graphs" in message for message in caplog.messages) == 1


class BrokenAfterTheImage(nn.Module):
    """The batch is an input of the first graph, and what the first graph returns one of the second, which it saves too."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 7, stride=4), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.patches(x))
        torch._dynamo.graph_break()
        return self.head(x).relu().square().mean()


def test_what_earlier_graphs_have_read_counts() -> None:
    module, x = compiled(BrokenAfterTheImage()), torch.randn(8, 3, 128, 128)
    found = run_step(module, {"x": x})
    assert found.peak_bytes <= remat.plans(module)[-1].plan.peak_bytes < 1.1 * found.peak_bytes


class Stages(nn.Module):
    """Each in a graph of its own; between them what the graph before keeps, as it is or as a view."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self.layers, self.views = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)]), views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _passed(torch.tanh(self.layers[0](x)), self.views)
        x = _passed(torch.tanh(self.layers[1](x)), self.views)
        x = _passed(torch.tanh(self.layers[2](x)), self.views)
        return self.layers[3](x).square().mean()


@torch._dynamo.disable
def _passed(x: torch.Tensor, view: bool) -> torch.Tensor:
    return x.view_as(x) if view else x


@pytest.mark.parametrize("views", [False, True])
def test_what_passes_between_graphs_counts_once_too_often_at_most(views: bool) -> None:
    module, x = compiled(Stages(views)), torch.randn(2048, 64)
    found = run_step(module, {"x": x})
    assert found.peak_bytes <= remat.plans(module)[-1].plan.peak_bytes <= found.peak_bytes + 1.01 * x.nbytes


def test_compiling_a_later_graph_runs_no_hook_of_an_earlier_ones() -> None:
    first, second = compiled(nn.Sequential(nn.Linear(64, 64), nn.Tanh())), compiled(nn.Linear(64, 1))
    unpacked: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        loss = second(first(torch.randn(16, 64))).sum()
    assert not unpacked
    loss.backward()


class BrokenAtTheEnd(nn.Module):
    """There is more than one graph to come, and then none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, _ = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        torch._dynamo.graph_break()
        return h


def test_a_graph_before_a_break_is_held_to_the_budget() -> None:
    model, x = BrokenAtTheEnd(), torch.randn(64, 32)
    error = refused(compiled(model, 1), x=x)
    assert isinstance(error, remat.BudgetError)
    assert error.budget_bytes == 1
    assert "graphs share the budget" in str(error)
    assert error.minimum_bytes is not None
    torch._dynamo.reset()
    module = compiled(model, error.minimum_bytes)
    assert run_step(module, {"x": x}).peak_bytes <= error.minimum_bytes
    (graph,) = remat.plans(module)
    assert graph.plan.dropped


def test_too_little_host_memory_is_no_share_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise remat.HostBudgetError("so much", minimum_bytes=7, where="host memory")

    monkeypatch.setattr(compilation, "solve", short)
    error = refused(compiled(BrokenAtTheEnd(), 1), x=torch.randn(64, 32))
    assert isinstance(error, remat.HostBudgetError)
    assert error.minimum_bytes == 7
    assert "graphs share the budget" not in str(error)


class BrokenAtTheLoss(nn.Module):
    """The last graph has the largest working set, of which those before it know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Mlp(), nn.Linear(32, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner.layers:
            x = x + layer(x)
        torch._dynamo.graph_break()
        return self.head(x).logsumexp(-1).mean()


def test_the_budget_that_the_last_graph_names_is_enough() -> None:
    model, x = BrokenAtTheLoss().train(), torch.randn(256, 32)
    budget = 1
    for _graph in range(2):
        error = refused(compiled(model, budget), x=x)
        assert isinstance(error, remat.BudgetError)
        assert error.minimum_bytes is not None
        assert str(error.minimum_bytes) in str(error)
        torch._dynamo.reset()
        budget = error.minimum_bytes
    run_step(module := compiled(model, budget), {"x": x})
    assert len(remat.plans(module)) == 2


@pytest.mark.slow
def test_gpt2_as_it_comes_breaks_at_its_loss() -> None:
    model, kwargs = build("gpt2")
    model.loss_type = None
    reference = compiled(model)
    expected = run_step(reference, kwargs)
    peak = max(graph.plan.peak_bytes for graph in remat.plans(reference))
    torch._dynamo.reset()
    model, kwargs = build("gpt2")
    model.loss_type = None
    budget = int(0.85 * peak)
    module = compiled(model, budget)
    outcome = run_step(module, kwargs)
    assert_same(outcome, expected)
    assert len(remat.plans(module)) > 1
    assert outcome.peak_bytes <= budget


def test_eval_and_no_grad() -> None:
    model, x = mlp()
    module = compiled(model, 0.8)
    model.eval()
    with torch.no_grad():
        assert torch.equal(module(x), model(x))


class Counting(Mlp):
    """Scales by what a buffer holds before and after it is written to."""

    def __init__(self) -> None:
        super().__init__(layers=2, dropout=0.0)
        self.register_buffer("steps", torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.steps[:32].sum() / 32
        x = torch.tanh(self.layers[0](x) * before)
        self.steps.mul_(1.5)
        return super().forward(x * torch.sin(self.steps[:32]))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_backward_recomputes_nothing_from_a_buffer_that_forward_has_written_to(compiler: str) -> None:
    torch.manual_seed(0)
    model, x = Counting().train(), torch.randn(64, 32)
    module = compiled(copy.deepcopy(model), compiler=compiler, policy="blocks")
    expected, outcome = run_step(model, {"x": x}), run_step(module, {"x": x})
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)
    assert torch.equal(module.steps, model.steps)


def test_training_with_an_optimizer() -> None:
    model, x = mlp(dropout=0.0)
    twin = copy.deepcopy(model)
    module = compiled(model, 0.8)
    for m in (module, twin):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(3):
            m(x).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_backward_twice() -> None:
    model, x = mlp()
    module = compiled(model, 0.8)
    loss = module(x)
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.rand(3)
    loss.backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# ---- door 1's result under torch.compile ----


@pytest.mark.slow
def test_a_rewritten_module_compiles_without_a_break() -> None:
    model, kwargs = build("llama")
    unconstrained = remat.plan(model, (), kwargs, budget=None)
    budget = remat.frontier(model, (), kwargs, points=2)[-1].peak_bytes
    module = remat.optimize(model, (), kwargs, budget=budget)
    expected = run_step(module, kwargs)
    outcome = run_step(torch.compile(module, backend="aot_eager", fullgraph=True), kwargs)
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-5)
    gradients = sum(g.nbytes for g in outcome.gradients.values())
    assert outcome.peak_bytes <= 1.1 * expected.peak_bytes + gradients
    assert outcome.peak_bytes < unconstrained.peak_bytes


def test_what_runs_before_the_one_graph_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo runs a loop with a graph break in it as it is, all of it."""
    layers = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32, momentum=None), nn.ReLU())
    for model, count in ((nn.Linear(32, 32), 0), (nn.Sequential(nn.Sequential(layers), Mlp()), 1)):
        compiled(model.train(), "1GiB")(torch.randn(64, 32, requires_grad=True)).sum().backward()
        assert caplog.text.count("graph breaks") == count


def test_a_model_that_is_compiled_for_another_shape_has_no_graph_break(caplog: pytest.LogCaptureFixture) -> None:
    model, x = mlp(rows=64)
    module = torch.compile(model, backend="remat", options={"budget": 0.9, "compiler": "eager"}, dynamic=False)
    run_step(module, {"x": x})
    run_step(module, {"x": torch.cat((x, x))})
    assert len(remat.plans(module)) == 2
    assert "graph breaks" not in caplog.text


class Selecting(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[x.sum(1) > 0])  # as many rows as the data say


def test_sizes_that_depend_on_data_are_refused_with_the_line_unless_dynamo_ends_the_graph_there() -> None:
    model, x = Selecting().train(), torch.randn(64, 32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        error = refused(compiled(model, budget=0.9), x=x)
    assert isinstance(error, remat.CaptureError)
    assert re.search(r"the size of index \(test_door2.py:\d+\) depends on data.*capture_dynamic_output_shape_ops", str(error))
    torch._dynamo.reset()
    expected = run_step(model, {"x": x})
    assert_same_gradients(run_step(compiled(model, budget=0.9), {"x": x}).gradients, expected.gradients)


def test_a_factor_that_depends_on_data_is_no_size() -> None:
    model, x = mlp(rows=64)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        module = compiled(lambda x: model(x) / x.abs().max().item(), budget=0.9)
        module(x).backward()
    assert len(remat.plans(module)) == 1


def test_what_the_caller_lets_go_of_is_gone() -> None:
    model, x = mlp()
    batch = torch.randn(8)
    alive = weakref.ref(batch)
    compiled(model)(x).backward()
    del batch
    assert alive() is None


class Siamese(nn.Module):
    """Batch norm that runs twice: the first writes statistics that the second reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return -nn.functional.cosine_similarity(self.body(x), self.body(other)).mean()


def test_statistics_that_are_written_before_backward() -> None:
    inputs = {"x": torch.randn(256, 32), "other": torch.randn(256, 32)}
    least = refused(compiled(Siamese(), budget=1), **inputs)
    assert isinstance(least, remat.BudgetError)
    assert least.minimum_bytes is not None
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, model = Siamese(), Siamese()
    model.load_state_dict(plain.state_dict())
    expected = run_step(plain, inputs)
    outcome = run_step(compiled(model, least.minimum_bytes), inputs)
    assert_same(outcome, expected)
    assert outcome.peak_bytes <= least.minimum_bytes < expected.peak_bytes
    assert_same_gradients(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.usefixtures("_dynamo")
def test_a_sparse_gradient_of_sums_of_rows_counts() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.EmbeddingBag(500, 32, mode="sum", sparse=True), nn.Linear(32, 32)

        def forward(self, picked: torch.Tensor) -> torch.Tensor:
            return self.head(self.rows(picked)).square().mean()

    model, picked = Bags(), torch.arange(256 * 64).view(256, 64) % 500
    module: Any = torch.compile(model, backend="remat", options={"compiler": "eager"})
    peak = run_step(module, {"picked": picked}).peak_bytes
    assert peak > picked.numel() * 32 * 4
    assert 0.97 < peak / remat.plans(module)[0].plan.peak_bytes <= 1


# ---- dropout ----


class _Turned(nn.Module):
    """Dropout of numbers that lie otherwise than their indices say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.dropout(nn.functional.gelu(self.first(x)).mT, 0.3).mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_dropout_the_mask_may_be_saved_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(*(_Turned() for _ in range(4))).to(dtype)
    x = torch.randn(4, 64, 32, dtype=dtype)
    expected = run_step(torch.compile(model, backend="aot_eager"), {"input": x})
    for budget in (None, 0.5):
        torch._dynamo.reset()
        step = compiled(model, budget)
        assert_same(run_step(step, {"input": x}), expected)
    plan = remat.plans(step)[0].plan
    drawn = [a for block in plan.blocks for a in block.activations if "bernoulli" in a.op]
    assert drawn
    assert all((a.decision, a.dtype) == (remat.Decision.SAVE, "bool") for a in drawn)
    assert not any("native_dropout" in moment.name and not moment.is_backward for moment in plan.timeline)
