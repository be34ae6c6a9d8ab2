"""Door 2 with Inductor, on a few small models: compiling takes long."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor.kernel import conv
from torch.utils._python_dispatch import TorchDispatchMode

import remat
from remat._torch import wrapper_code
from remat.compilation import Compilation, _Exceeded
from remat.inductor import _Reading
from remat.inductor_fusion import LocalFusion
from remat.inductor_memory import Headroom
from remat.session import Options, Session
from tests.models import llama, mlp
from tests.steps import Outcome, assert_close_gradients, refused, run_step

pytestmark = pytest.mark.usefixtures("_dynamo", "_own_cache")


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that other runs left in Inductor's cache stay out, so that each run compiles and plans."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def compiled(model: nn.Module, budget: Any) -> Any:
    return torch.compile(model, backend="remat", options={"budget": budget})


@pytest.mark.slow
def test_llama_within_a_budget() -> None:
    torch.manual_seed(0)
    model, kwargs = llama(layers=1, width=128, length=128)
    expected = run_step(model.train(), kwargs)
    module = compiled(model, 0.75)
    outcome = run_step(module, kwargs)
    (graph,) = remat.plans(module)
    budget = graph.plan.budget_bytes
    assert budget is not None
    assert graph.plan.dropped
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)
    assert torch.allclose(outcome.loss, expected.loss, rtol=1e-5)
    assert outcome.peak_bytes <= budget
    assert graph.plan.peak_bytes <= budget
    assert abs(graph.plan.peak_bytes / outcome.peak_bytes - 1) <= 0.03
    assert outcome.output_type is expected.output_type


class Wide(nn.Module):
    """Backward recomputes the GELU for the gradient of the second product, from what the GELU's own gradient reads later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(64, 512), nn.Linear(512, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.gelu(self.first(self.norm(x)), approximate="tanh"))


class Gated(Wide):
    """The gradients of gate and value are one storage, which is there as soon as the first of them is."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.first(self.norm(x)).chunk(2, dim=-1)
        return x + self.second(value * nn.functional.gelu(gate))


class Tied(nn.Module):
    """The embedding is the output head, whose gradient is a product with that of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(1024, 64), nn.Sequential(Wide(), Wide())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(self.blocks(self.embedding(x)), self.embedding.weight)
        return nn.functional.cross_entropy(logits, x)


def stacked(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    return nn.Sequential(*(kind() for _ in range(4))), {"input": torch.randn(512, 64)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "budget"),
    [(lambda: stacked(Wide), 0.4), (lambda: stacked(Gated), 0.5), (lambda: (Tied(), {"x": torch.arange(512)}), 0.8)],
    ids=["wide", "gated", "tied"],
)
def test_generated_code_holds_what_is_planned(build: Callable[[], tuple[nn.Module, dict[str, Any]]], budget: float) -> None:
    """Where Inductor would fuse what is recomputed with what runs later, and where results lie over what they are made of."""
    model, inputs = build()
    outcome = run_step(module := compiled(model, budget), inputs)
    (graph,) = remat.plans(module)
    assert graph.plan.dropped
    ((planned, generated),) = graph.peaks
    assert graph.plan.budget_bytes is not None
    assert 0.99 * planned <= outcome.peak_bytes <= generated == graph.plan.peak_bytes <= graph.plan.budget_bytes


@pytest.mark.slow
def test_gradients_of_logits_are_gone_when_that_of_the_embedding_is_summed_up() -> None:
    run_step(module := compiled(Tied(), None), {"x": torch.arange(512)})
    (graph,) = remat.plans(module)
    logits = [storage for storage in graph.plan.storages if storage.bytes == 512 * 1024 * 4]
    assert logits
    assert all(storage.dies < len(graph.plan.timeline) * 0.8 for storage in logits)


@pytest.mark.slow
def test_dropout_is_replayed() -> None:
    model, x = mlp(layers=2, dropout=0.3, rows=512)
    expected = run_step(compiled(model, None), {"x": x})
    torch._dynamo.reset()
    module = compiled(model, 0.8)
    outcome = run_step(module, {"x": x})
    (graph,) = remat.plans(module)
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)
    assert torch.allclose(outcome.loss, expected.loss, rtol=1e-5)
    assert graph.plan.budget_bytes is not None
    assert outcome.peak_bytes <= graph.plan.budget_bytes


class Convolutions(TorchDispatchMode):
    """Notes the images and gradients that gradients of convolutions are computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.read.extend(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_inputs_that_inductor_copies_for_a_convolution_count() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(16, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 16, 1), nn.GELU())
    model = nn.Sequential(stem, nn.Upsample(scale_factor=4.0))
    images = torch.randn(8, 16, 32, 32)
    outcome = run_step(module := compiled(model, None), {"input": images})
    (graph,) = remat.plans(module)
    assert abs(graph.plan.peak_bytes / outcome.peak_bytes - 1) <= 0.05


@pytest.mark.slow
def test_weights_of_convolutions_are_saved_as_they_are() -> None:
    """Inductor would save copies with their channels last."""
    model = nn.Sequential(
        *(layer for c in (16, 64, 64) for layer in (nn.Conv2d(c, 64, 3, padding=1), nn.SiLU())), nn.Conv2d(64, 16, 1)
    )
    weights = {parameter.data_ptr() for parameter in model.parameters() if parameter.dim() == 4}
    outcome = run_step(module := compiled(model, None), {"input": (images := torch.randn(2, 16, 10, 10))})
    (graph,) = remat.plans(module)
    assert abs(graph.plan.peak_bytes / outcome.peak_bytes - 1) <= 0.01
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(images)
    assert weights <= {tensor.data_ptr() for tensor in saved}


class NextBlock(nn.Module):
    """A convolution of each channel alone, and a product over channels, as in a ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.linear(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return x + nn.functional.gelu(mixed).permute(0, 3, 1, 2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(conv, "convolution_backward_lowering"), reason="this torch has traced layouts there (2.11)")
def test_backward_runs_convolutions_with_channels_last_like_forward() -> None:
    """Though it recomputes none."""
    torch.manual_seed(0)
    module = compiled(nn.Sequential(nn.Conv2d(3, 16, 4, 4), NextBlock(16), NextBlock(16)), None)
    loss = module(torch.randn(2, 3, 32, 32)).sum()
    with Convolutions() as seen:
        loss.backward()
    assert len(seen.read) == 6
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen.read)


class _Bias(nn.Module):
    """Its backward has no op: the gradient of the result is that of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias + x


def test_a_backward_without_ops() -> None:
    module = compiled(_Bias(), "1MiB")
    module(torch.ones(8, 8)).backward(torch.full((8, 8), 3.0))
    assert torch.equal(next(module.parameters()).grad, torch.full((8, 8), 3.0))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_graph_from_the_cache_is_that_of_its_budget() -> None:
    model, x = mlp(layers=2, rows=512)
    peaks = []
    for budget in (1.0, 0.8, 1.0, 0.8):
        module = compiled(model, budget)
        outcome = run_step(module, {"x": x})
        (graph,) = remat.plans(module)
        assert outcome.peak_bytes <= graph.plan.budget_bytes  # type: ignore[operator]
        peaks.append(outcome.peak_bytes)
        torch._dynamo.reset()
    assert peaks[:2] == peaks[2:]
    assert peaks[1] < peaks[0]


def test_a_model_without_options_is_compiled_with_inductor_and_saves_what_is_fastest() -> None:
    first, x = mlp(layers=1)
    second, y = mlp(layers=2, width=16)
    modules = [(torch.compile(model, backend="remat"), z) for model, z in ((first, x), (second, y))]
    for module, z in modules:
        module(z).backward()
    found = [remat.plans(module) for module, _ in modules]
    assert [len(plans) for plans in found] == [1, 1]
    assert all(graph.plan.budget_bytes is None for plans in found for graph in plans)


@pytest.mark.slow
def test_a_rewritten_module_under_inductor() -> None:
    model, x = mlp(layers=2, rows=512, dropout=0.0)
    budget = remat.frontier(model, (x,), points=2)[-1].peak_bytes
    module = remat.optimize(model, (x,), budget=budget)
    expected = run_step(module, {"x": x})
    outcome = run_step(torch.compile(module, fullgraph=True), {"x": x})
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)
    gradients = sum(g.nbytes for g in outcome.gradients.values())
    assert outcome.peak_bytes <= 1.1 * expected.peak_bytes + gradients


@pytest.mark.slow
def test_values_wait_on_the_host_through_inductor() -> None:
    layers = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(3)]
    model, kwargs = nn.Sequential(*layers), {"input": torch.randn(8, 16, 32, 32)}  # channels-last inside

    def through(**options: Any) -> tuple[Outcome, remat.Plan]:
        torch._dynamo.reset()
        module = torch.compile(copy.deepcopy(model), backend="remat", options=options)
        return run_step(module, kwargs), remat.plans(module)[0].plan

    expected, everything = through()
    outcome, plan = through(policy="offload-all")
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)
    assert plan.host_bytes > 0
    assert outcome.peak_bytes <= plan.peak_bytes < everything.peak_bytes
    assert plan.peak_bytes / outcome.peak_bytes <= 1.03


def test_code_from_inductors_cache_has_its_peak() -> None:
    model, x = mlp(layers=2, dropout=0.3, rows=512)
    run_step(module := compiled(model, 0.8), {"x": x})
    (first,) = remat.plans(module)
    torch._dynamo.reset()
    counters.clear()
    outcome = run_step(module := compiled(model, 0.8), {"x": x})
    (second,) = remat.plans(module)
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert second.plan.peak_bytes == first.plan.peak_bytes >= outcome.peak_bytes
    assert second.plan.storages == first.plan.storages


def test_freed_buffers_wait_for_later_ones_below_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy(_Reading):
        def estimate(self, lines: Sequence[Any]) -> Headroom:
            room = super().estimate(lines)
            seen.append((room.overall_peak_memory, sum(isinstance(line, wrapper_code.ReuseLine) for line in lines)))
            return room

        def read(self, lines: Sequence[Any]) -> list[str]:
            self.estimate(lines)
            return super().read(lines)

    monkeypatch.setattr("remat.inductor._Reading", Spy)
    model, x = mlp(layers=2, rows=512)
    outcome = run_step(module := compiled(model, None), {"x": x})
    (graph,) = remat.plans(module)
    (peak, in_place), (peak_with_reuse, reused) = seen[2:]  # of backward
    assert peak_with_reuse <= peak
    assert reused > in_place
    assert outcome.peak_bytes <= graph.plan.peak_bytes


@pytest.mark.slow
def test_fusion_gives_way_where_nothing_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remat.ladder._TRIES", 0)
    monkeypatch.setattr(LocalFusion, "_room", lambda *_: float("inf"))  # where the plan does not know how much is left
    model, x = mlp(layers=2, dropout=0.0, rows=512)
    expected = run_step(model, {"x": x})
    least: list[int] = []
    for last in ([(0, False)], [(0, False), (0, True)]):
        monkeypatch.setattr("remat.ladder._LAST", last)
        error = refused(compiled(model, 1), x)
        assert isinstance(error, remat.BudgetError)
        assert error.minimum_bytes is not None
        least.append(error.minimum_bytes)
        torch._dynamo.reset()
    assert least[1] < 0.95 * least[0]
    outcome = run_step(compiled(model, least[1]), {"x": x})
    assert outcome.peak_bytes <= least[1]
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)


@pytest.mark.parametrize("given_up", [True, False])
def test_only_code_that_was_too_large_is_given_up(given_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another failure is no matter of the budget, even where that is exceeded too."""

    def failing(*_: Any) -> None:
        try:
            raise _Exceeded if given_up else KeyError("made up")
        except Exception as error:
            raise RuntimeError("lowering failed") from error

    monkeypatch.setattr("remat.compilation.compile_graph", failing)
    monkeypatch.setattr(Compilation, "_exceeds", lambda *_: True)
    run = Compilation(Options.read(None), Session(None, None, None), (), 0, False)
    monkeypatch.setattr(run, "_task", object())
    if given_up:
        assert run._compiled(fx.GraphModule({}, fx.Graph())) is None
        return
    with pytest.raises(RuntimeError, match="lowering failed"):
        run._compiled(fx.GraphModule({}, fx.Graph()))


def test_cached_code_that_tells_of_another_graph_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(layers=2, dropout=0.3, rows=512)
    expected = run_step(module := compiled(model, None), {"x": x})
    (first,) = remat.plans(module)
    torch._dynamo.reset()
    monkeypatch.setattr(_Reading, "_digest", lambda _: "another")
    outcome = run_step(module := compiled(model, None), {"x": x})
    (second,) = remat.plans(module)
    assert second.plan.storages == first.plan.storages
    assert_close_gradients(outcome.gradients, expected.gradients, 1e-4)


@pytest.mark.slow
def test_fusion_is_ours_after_other_compilations_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ours = LocalFusion.can_fuse_vertical

    def can_fuse_vertical(*args: Any) -> bool:
        asked.append(args)
        return ours(*args)

    monkeypatch.setattr(LocalFusion, "can_fuse_vertical", can_fuse_vertical)
    model, x = mlp(layers=1, dropout=0.0, rows=8)
    plain = torch.compile(model, backend="inductor")
    plain(x).sum().backward()
    assert not asked
    compiled(model, None)(x).sum().backward()
    assert asked
    asked.clear()
    plain(x[:5]).sum().backward()
    assert not asked


class _Shows(nn.Module):
    """Its hidden state is saved for backward; `shows` lets the caller hold it too."""

    def __init__(self, shows: bool) -> None:
        super().__init__()
        self.first, self.second, self.shows = nn.Linear(64, 256), nn.Linear(256, 8), shows

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = self.first(x).exp()
        return self.second(hidden).exp().sum(), hidden.detach() if self.shows else None


class _ShowsMatrix(_Shows):
    """Of images, and saved as the matrix that is read."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = nn.functional.silu(self.first(x.view(2, 16, 16, 64))).view(512, 256)
        return self.second(hidden).exp().sum(), hidden.detach() if self.shows else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [_Shows, _ShowsMatrix])
def test_cached_code_knows_what_the_caller_holds(kind: type[_Shows]) -> None:
    x, peaks = torch.randn(512, 64), []
    for shows in (False, True):
        torch._dynamo.reset()
        module = compiled(model := kind(shows), None)
        for _ in range(2):
            model.zero_grad()
            loss, hidden = module(x)
            loss.backward()
            del loss, hidden
        model.zero_grad()

        def step(module: Any = module) -> None:
            loss, hidden = module(x)
            loss.backward()
            del hidden

        (graph,) = remat.plans(module)
        peaks.append((graph.plan.peak_bytes, remat.measure(step).peak_bytes))
    assert all(measured <= planned <= 1.05 * measured for planned, measured in peaks)
