"""Scratch memory of kernels on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remat import workspace
from remat.measure import measure_cpu
from remat.workspace import Call, workspace_bytes

aten = torch.ops.aten
N = 64 * 64


@pytest.mark.parametrize(
    ("op", "types", "args", "expected"),
    [
        (aten.mul.Tensor, [torch.float32, torch.float32], (), 0),
        (aten.mul.Tensor, [torch.float32, torch.bool], (), 4 * N),
        (aten.add.Tensor, [torch.float64, torch.float32], (), 8 * N),
        (aten.where.self, [torch.bool, torch.float32, torch.float32], (), 0),
        (aten.sum.dim_IntList, [torch.float32], ([1],), 0),
        (aten.sum.dim_IntList, [torch.bool], ([1],), 8 * N),
    ],
)
def test_types_that_differ_are_copied_first(op: Any, types: list[torch.dtype], args: tuple[Any, ...], expected: int) -> None:
    tensors = [torch.zeros(64, 64, dtype=dtype) for dtype in types]
    assert workspace_bytes(Call.of(op, (*tensors, *args), {})) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_run_to_know(dtype: torch.dtype) -> None:
    half, full = (Call.of(aten.mm.default, (x, x), {}) for x in (torch.zeros(64, 64, dtype=dtype), torch.zeros(64, 64)))
    assert half is not None
    assert full is not None
    assert half.has_scratch
    assert not full.has_scratch


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.zeros(64, 64), 0),
        (torch.zeros(64, 64).t(), 0),
        (torch.zeros(64, 128)[:, :64], 0),
        (torch.zeros(64, 64, 4)[..., 1], 4 * N),
        (torch.zeros(64, 1).expand(64, 64), 4 * N),
        (torch.zeros(64).expand(64, 64), 4 * N),
    ],
)
def test_products_copy_matrices_with_gaps(matrix: torch.Tensor, expected: int) -> None:
    assert workspace_bytes(Call.of(aten.mm.default, (matrix, torch.zeros(64, 64)), {})) == expected


def test_transposed_matrices_are_copied_by_blocks() -> None:
    x = torch.zeros(64, 64)
    measured, _ = measure_cpu(lambda: aten.clone.default(x.t(), memory_format=torch.contiguous_format))
    assert (
        workspace_bytes(Call.of(aten.clone.default, (x.t(),), {"memory_format": torch.contiguous_format}))
        == measured - x.nbytes
    )
    assert workspace_bytes(Call.of(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})) == 0


def test_conjugate_views_are_copied_first() -> None:
    x = torch.zeros(2, 64, 64, dtype=torch.cfloat)
    expected = ((x, 0), (x.conj(), x.nbytes), (x.conj().mT, x.nbytes))
    assert [workspace_bytes(Call.of(aten.bmm.default, (x, y), {})) for y, _ in expected] == [found for _, found in expected]


@pytest.mark.parametrize("op", [aten.mkldnn_rnn_layer_backward.default, aten._cudnn_rnn_backward.default])
def test_what_only_its_forward_can_feed_is_not_run(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run without that it ends the process."""
    monkeypatch.setattr(workspace, "_run_once", lambda call: 7)
    call = Call.of(op, (torch.zeros(64, 64), torch.zeros(0, dtype=torch.uint8)), {})
    assert workspace_bytes(call) == 4 * N


def convolution_backward(size: int) -> Call | None:
    x, weight = torch.zeros(2, 8, size, size), torch.zeros(8, 8, 3, 3)
    args = (x, x, weight, [8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
    return Call.of(aten.convolution_backward.default, args, {})


def test_what_zeros_cannot_feed_counts_with_its_largest_input() -> None:
    call = Call.of(aten.multinomial.default, (torch.rand(4, 1000), 2), {})
    assert workspace_bytes(call) == 4 * 4000


def measured(op: Any, *args: Any) -> int:
    """Scratch bytes of an op on these values."""
    peak, _ = measure_cpu(lambda: op(*args))
    return peak - op(*args).untyped_storage().nbytes()


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_powers_of_a_matrix_are_those_of_large_values(scale: float) -> None:
    matrix = scale * torch.randn(48, 48)
    found = workspace_bytes(Call.of(aten.linalg_matrix_exp.default, (matrix,), {}))
    assert found >= measured(aten.linalg_matrix_exp.default, matrix)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["sum", "mean", "max"])
def test_bags_of_embeddings_are_not_empty(mode: int) -> None:
    weight, indices, offsets = torch.randn(97, 48), torch.randint(0, 97, (128,)), torch.arange(0, 128, 4)
    out, *others = aten._embedding_bag.default(weight, indices, offsets, False, mode)
    args = (torch.ones_like(out), indices, offsets, *others, 97, False, mode, False, None)
    op = aten._embedding_bag_backward.default
    assert workspace_bytes(Call.of(op, args, {})) == measured(op, *args)


def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device has no memory for today it may have tomorrow."""

    def full(*_: object) -> int:
        raise torch.OutOfMemoryError("made up")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_run_once", full)
        assert workspace_bytes(convolution_backward(23)) == 4 * 2 * 8 * 23 * 23
    measured = workspace_bytes(convolution_backward(23))
    assert measured != 4 * 2 * 8 * 23 * 23
    assert measured == pytest.approx(workspace_bytes(convolution_backward(22)), rel=0.2)


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Call] = []
    monkeypatch.setattr(workspace, "_run_once", lambda call: ran.append(call) or 7)
    largest = 4 * 2 * 8 * 21 * 21
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "free_bytes", lambda device: 3 * largest)
        assert workspace_bytes(convolution_backward(21)) == largest
    assert not ran
    monkeypatch.setattr(workspace, "_known", {})
    assert workspace_bytes(convolution_backward(21)) == 7
