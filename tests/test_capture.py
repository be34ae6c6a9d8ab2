"""What of a model's ways is captured."""

from __future__ import annotations

import copy
import logging
import logging.handlers
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional
from torch.nn.functional import interpolate
from transformers import masking_utils

import remat
from remat.capture import capture
from tests import models
from tests.steps import assert_close_gradients, assert_same, assert_same_gradients, gradients_of, run_step


def _has_mask(model: nn.Module, **kwargs: torch.Tensor) -> bool:
    nodes = capture(model, (), kwargs).graph.nodes
    return any("attn_mask" in node.kwargs and node.kwargs["attn_mask"] is not None for node in nodes)


def test_no_causal_mask_where_positions_are_the_models_own() -> None:
    """As in an eager step, where transformers leaves it to the attention kernel."""
    model, kwargs = models.llama(layers=1)
    assert not _has_mask(model, **kwargs)


def test_no_causal_mask_with_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.18 it left it to the kernel where nothing was traced, whether there was a padding mask or not."""
    ignores = masking_utils._ignore_causal_mask_sdpa

    def ignored(padding_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> bool:
        return not masking_utils.is_tracing(padding_mask) and ignores(padding_mask, *args, **kwargs)

    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", ignored)
    model, kwargs = models.llama(layers=1)
    assert not _has_mask(model, **kwargs)
    assert _has_mask(model, **kwargs, attention_mask=torch.ones_like(kwargs["input_ids"]))


def test_kernels_that_are_tried_and_left_are_not_in_the_log() -> None:
    """Those for experts, which transformers finds another for in float32."""
    log, handler = logging.getLogger("torch._subclasses.fake_tensor"), logging.handlers.BufferingHandler(1000)
    log.addHandler(handler)
    try:
        model, kwargs = models.build("mixtral")
        remat.optimize(model, (), kwargs, budget=None)
    finally:
        log.removeHandler(handler)
    assert not [record for record in handler.buffer if record.levelno >= logging.ERROR]
    assert not log.filters


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y.sum() if y.sum() > 0 else -y.sum()


def test_an_error_is_not_preceded_by_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(remat.CaptureError, match="data-dependent"):
        remat.optimize(Looking(), (torch.randn(2, 8),), budget=None)
    assert "def forward" not in capsys.readouterr().err


def test_positions_among_the_inputs_may_be_of_several_sequences() -> None:
    model, kwargs = models.llama(layers=1)
    positions = torch.arange(models.LENGTH // 2).repeat(models.BATCH, 2)
    assert _has_mask(model, **kwargs, position_ids=positions)
    plain = copy.deepcopy(model)
    ours = remat.optimize(model, budget=None)
    for inputs in ({**kwargs, "position_ids": positions}, {**kwargs, "position_ids": positions.sort().values}):
        torch.testing.assert_close(ours(**inputs).loss, plain(**inputs).loss)


class _FromInputs(nn.Module):
    """Positions follow from the inputs: a row begins anew after each 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, _ = models.llama(layers=1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        begins = torch.where(input_ids == 0, steps, 0).cummax(1).values
        return self.inner(input_ids=input_ids, position_ids=steps - begins).logits


def test_positions_that_follow_from_inputs_are_looked_at() -> None:
    torch.manual_seed(0)
    model = _FromInputs().train()
    plain, ids = copy.deepcopy(model), torch.randint(1, models.VOCABULARY, (models.BATCH, models.LENGTH))
    packed = ids.clone()
    packed[:, 20] = 0
    ours = remat.optimize(model, (ids,), budget=None)
    torch.testing.assert_close(ours(packed), plain(packed))


class _Scan(nn.Module):
    """A recurrence that runs as a loop, and compiled as a scan, which export cannot hold (as Mamba in transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.gate(x).sigmoid()
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (kept, x), 1, combine_mode="generic")[1]
        states = [x[:, 0]]
        for i in range(1, x.shape[1]):
            states.append(kept[:, i] * states[-1] + x[:, i])
        return torch.stack(states, 1)


@pytest.mark.parametrize("whole_model", [True, False])
def test_what_compiled_steps_do_otherwise_is_left_out(whole_model: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(_Scan(), _Scan()), torch.randn(8, 6, 16)
    plain = copy.deepcopy(model)
    ours = remat.enable(model, budget=None, whole_model=whole_model)
    for each in (ours, plain):
        each(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)  # not bitwise: some versions of torch can export the scan


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x).sin(), lambda x: self.layer(x), (x,))


def test_branches_within_the_graph_are_for_compiled_steps() -> None:
    with pytest.raises(remat.CaptureError, match=r'cond runs a graph or op of its own.* torch.compile\(model, backend="remat"'):
        remat.optimize(_Branches(), (torch.randn(4, 16),), budget=None)


def test_capture_leaves_dynamo_as_it_was() -> None:
    """In a process of its own: Dynamo makes its tables once, here while export runs it on a branch."""
    script = """
import torch, remat
from tests.test_capture import _Branches

try:
    remat.optimize(_Branches(), (torch.randn(4, 16),), budget=None)
except remat.CaptureError:
    pass
asks = torch.compile(lambda x: x if torch.compiler.is_exporting() else x.sin(), backend="eager", fullgraph=True)
asks(torch.ones(3))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


class _Assigns(nn.Module):
    """Writes to parts and to the whole of tensors, in other types, shapes and layouts than what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x)
        parts = torch.zeros(len(x), 24, dtype=torch.float64)
        parts[:, :16] = h.sin()
        parts[:, 16:] = self.second(h)
        parts[:, 3] = 1.5
        parts[:, 5:7] = h[:, :1]
        turned = torch.empty(16, len(x)).t()
        turned.copy_(h * 2)
        straight = torch.empty(16, len(x)).copy_(h.t())
        return parts.cos().sum() + turned.square().sum() + straight.view(-1).exp().sum(), turned


def test_assignments_to_parts_of_tensors() -> None:
    torch.manual_seed(0)
    model, x = _Assigns(), torch.randn(4, 16)
    plain = copy.deepcopy(model)
    ours = remat.optimize(model, (x,), budget=None)
    (loss, turned), (expected, plainly_turned) = ours(x), plain(x)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert turned.stride() == plainly_turned.stride()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


class _Modes(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 8, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = torch.fft.rfft(x)
        kept = torch.zeros_like(modes)
        kept[..., :8] = torch.einsum("bix,iox->box", modes[..., :8].conj(), self.weight)
        kept[..., -1] = modes[..., 0]
        return torch.fft.irfft(kept).square().mean()


def test_assignments_to_parts_of_complex_tensors() -> None:
    plain, x = _Modes(), torch.randn(3, 4, 64)
    ours = remat.optimize(copy.deepcopy(plain), (x,), budget=None)
    for model in (plain, ours):
        model(x).backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)


class _Redraws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return h * h.clone().normal_()


def test_what_has_no_derivative_in_a_graph_says_so() -> None:
    with pytest.raises(remat.CaptureError, match=r"normal_functional is not implemented; torch.compile"):
        remat.optimize(_Redraws(), (torch.randn(4, 16),), budget=None)


def test_what_has_another_derivative_in_a_graph_says_so() -> None:
    with pytest.raises(remat.CaptureError, match=r"rrelu_with_noise_functional.default has another derivative"):
        remat.optimize(nn.Sequential(nn.Linear(16, 16), nn.RReLU()), (torch.randn(4, 16),), budget=None)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_that_a_graph_loses_says_so(kind: type[nn.RNNBase]) -> None:
    with pytest.raises(remat.CaptureError, match=r"loses the dropout between its layers in a graph; torch.compile"):
        remat.optimize(kind(8, 8, num_layers=2, dropout=0.2), (torch.randn(4, 3, 8),), budget=None)


class _Solves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return torch.linalg.solve(h.mT @ h + torch.eye(8), h.mT)


def test_ops_that_are_kept_in_order_say_so() -> None:
    model, x = _Solves(), torch.randn(4, 8)
    if torch.__version__ < (2, 13):  # there the checks of torch.linalg's solvers are ops like others
        assert torch.equal(remat.optimize(model, (x,), budget=None)(x), model(x))
        return
    with pytest.raises(remat.CaptureError, match=r"an op with effects.*; torch.compile"):
        remat.optimize(model, (x,), budget=None)


class _Upsamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        modes = [("nearest", {}), ("nearest-exact", {}), ("bilinear", {}), ("bicubic", {}), ("bilinear", {"antialias": True})]
        return sum(interpolate(h, scale_factor=2, mode=mode, **more).square().mean() for mode, more in modes)


def test_upsampling_keeps_its_kernels() -> None:
    torch.manual_seed(0)
    model, x = _Upsamples(), torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    ours = remat.optimize(model, (x,), budget=None)
    assert sum("upsample" in str(node.target) for node in ours.graph.nodes) == 5
    for each in (ours, plain):
        each(x).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert torch.ops.aten.upsample_bilinear2d.vec.py_kernels, "other tracing goes on as before"


@pytest.mark.parametrize(
    ("dtype", "p"), [(torch.bfloat16, 0.3), (torch.float16, 0.3), (torch.float32, 0.15), (torch.float64, 0.45)]
)
def test_dropout_rounds_as_the_plain_models(dtype: torch.dtype, p: float) -> None:
    """In single precision 1 / 0.85 is another number where the division is in double."""
    model = nn.TransformerEncoderLayer(16, 2, 64, dropout=p, batch_first=True).to(dtype)  # one of its dropouts is transposed
    kwargs = {"src": torch.randn(64, 12, 16).to(dtype)}
    plain = run_step(copy.deepcopy(model), kwargs)
    module = remat.optimize(model, (), kwargs, budget=0.7)
    assert_same(run_step(module, kwargs), plain)
    assert module.plan is not None
    assert module.plan.dropped


class _DrawsInPlace(nn.Module):
    """Of a tensor as it lies in memory, and of its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for axes in ((0, 1), (1, 2)):
            x = self.linear(x).transpose(*axes)[..., :8].sin()
            x = nn.functional.dropout(x * 2, 0.3, inplace=True)
            x = nn.functional.alpha_dropout(x, 0.3, training=True)
            x = x * torch.empty_like(x).bernoulli_(0.7)
        return x.square().mean()


def test_draws_in_place_fall_on_the_same_elements() -> None:
    model, kwargs = _DrawsInPlace(), {"x": torch.randn(8, 8, 8)}
    plain = run_step(copy.deepcopy(model), kwargs)
    module = remat.optimize(model, (), kwargs, budget=None)
    assert_same(run_step(module, kwargs), plain)
    assert not any("copy" in str(node.target) for node in module.graph.nodes)


def test_dropout_that_drops_nothing_is_no_copy() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.Linear(8, 8), nn.Dropout(0.5).eval()), torch.randn(4, 8)
    assert not any("clone" in str(node.target) for node in remat.optimize(model, (x,), budget=None).graph.nodes)
    with torch.random.fork_rng():
        model[1].p = 0.5
        ours = remat.optimize(model, (x,), budget=None)
        torch.manual_seed(0)
        found = ours(x)
        torch.manual_seed(0)
        assert torch.equal(found, model(x))


class _DrawsForNothing(nn.Module):
    """Draws in its second block what nothing reads, as where a head or a pooler is not used."""

    def __init__(self, draw: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8)) for _ in range(3)
        )
        self.unused = nn.Linear(8, 8)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = x + layer(x)
            if index == 1:
                self.draw(self.unused(x))
        return functional.dropout(x, 0.5).square().mean()


@pytest.mark.parametrize(
    "draw",
    [
        functional.dropout,
        torch.rand_like,
        lambda x: torch.empty(3).normal_(),
        lambda x: torch.poisson(x.exp()),
        lambda x: functional.dropout(x, 1.0),  # draws nothing
    ],
    ids=["dropout", "rand_like", "normal_", "poisson", "all dropped"],
)
def test_what_is_drawn_for_nothing_is_drawn(draw: Callable[[torch.Tensor], object]) -> None:
    model, x = _DrawsForNothing(draw), torch.randn(64, 8)
    by_block = copy.deepcopy(model)
    expected = run_step(model, {"x": x})
    assert "unused.weight" not in expected.gradients
    smallest = remat.frontier(model, (x,), points=2)[-1].peak_bytes
    assert_same(run_step(remat.optimize(model, (x,), budget=smallest), {"x": x}), expected)
    remat.optimize_blocks(by_block, (x,), budget=None, policy="blocks")
    assert_same(run_step(by_block, {"x": x}), expected)


class _DropsAll(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype) @ self.weight
        return (x.cos() + functional.dropout(x, 1.0)).abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_dropout_that_drops_all_draws_nothing(dtype: torch.dtype) -> None:
    model, x = _DropsAll(dtype), torch.randn(4, 8)
    plain = run_step(model, {"x": x}, disturb=False)
    assert_same(run_step(remat.optimize(model, (x,), budget=None), {"x": x}, disturb=False), plain)
    assert torch.equal(plain.rng, torch.Generator().manual_seed(1).get_state())


class _Checks(nn.Module):
    """That its input fits, by the values of tensors, as transformers' vision-language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(places.sum() == len(x))
        torch._check(places.max().item() < 2)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch._check_tensor_all(places.min() == 1)
        return self.second(self.first(x).relu()).square().mean()


def test_checks_of_values_are_left_out() -> None:
    model, kwargs = _Checks(), {"x": torch.randn(16, 8), "places": torch.ones(16, dtype=torch.long)}
    plain = run_step(model, kwargs)
    assert_same(run_step(remat.optimize(model, (), kwargs, budget=None), kwargs), plain)


class _Margins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = self.layer(x)
        return functional.multilabel_margin_loss(scores, labels) + functional.multi_margin_loss(scores, labels[:, 0])


def test_margin_losses_keep_their_kernels() -> None:
    """As torch decomposes them, the first is nine times as large."""
    torch.manual_seed(0)
    model, x, labels = _Margins(), torch.randn(6, 8), torch.full((6, 10), -1)
    labels[:, 0] = torch.arange(6)
    plain = copy.deepcopy(model)
    loss, expected = remat.optimize(model, (x, labels), budget=None)(x, labels), plain(x, labels)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_line_that_cannot_be_captured_may_lie_in_any_folder(tmp_path: Path) -> None:
    """Also in one named as torch's or as ours."""
    path = tmp_path / "torch" / "remat" / "their_model.py"
    path.parent.mkdir(parents=True)
    lines = (
        "import torch",
        "class Model(torch.nn.Linear):",
        "    def forward(self, x):",
        "        return x if x.sum() > 0 else -x",
    )
    path.write_text("\n".join(lines))
    theirs = runpy.run_path(str(path))
    with pytest.raises(remat.CaptureError, match=r"their_model\.py:4: return x if x\.sum\(\) > 0"):
        remat.optimize(theirs["Model"](4, 4), (torch.randn(2, 4),), {}, budget=None)


@pytest.mark.parametrize("whole_model", [True, False])
def test_capture_while_autograd_looks_for_nan(whole_model: bool) -> None:
    model, x = models.mlp()
    remat.enable(model, 0.9, whole_model=whole_model)
    with torch.autograd.set_detect_anomaly(True):
        model(x).backward()
        assert torch.is_anomaly_enabled()
    assert all(p.grad is not None for p in model.parameters())


class Scripted(nn.Module):
    """A scripted function and modules, among parameters before and after."""

    def __init__(self) -> None:
        super().__init__()
        part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.layers = nn.ModuleList([nn.Linear(8, 8), torch.jit.script(part), torch.jit.trace(part, torch.randn(2, 8))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = softclamp(layer(x), 5.0)
        return x.square().mean()


@torch.jit.script
def softclamp(x: torch.Tensor, limit: float) -> torch.Tensor:
    return (x / limit).tanh() * limit


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_keep_their_gradients() -> None:
    """Compiled by torch.jit, after two calls, they have a backward that no graph would have."""
    torch.manual_seed(0)
    model, x = Scripted(), torch.randn(2, 8)
    expected = gradients_of(model, x)
    for _ in range(3):
        optimized = remat.optimize(model, (x,), budget="1GiB")
        assert_close_gradients(gradients_of(optimized, x), expected, 1e-5)  # torch.jit has formulas of its own
        assert_close_gradients(gradients_of(model, x), expected, 1e-5)
    with pytest.raises(remat.RematError, match=r"layers\.1 is a module of torch\.jit"):
        remat.enable(model, "1GiB", whole_model=False)


@pytest.mark.parametrize("kind", [nn.ELU, nn.CELU, nn.SELU])
def test_an_elu_in_place_has_the_gradient_of_its_result(kind: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 32), kind(inplace=True), nn.Linear(32, 16), nn.ELU()) for _ in range(4))
    )
    x = torch.randn(64, 16)
    expected = gradients_of(model, input=x)
    for budget in (None, 0.7):
        optimized = remat.optimize(model, (x,), budget=budget)
        assert_same_gradients(gradients_of(optimized, input=x), expected)
    assert optimized.plan is not None
    assert optimized.plan.dropped
