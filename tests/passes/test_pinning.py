"""What must never run twice."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from remat._torch import FakeTensorMode
from remat.passes.pinning import why_pinned

aten = torch.ops.aten
NOTHING: frozenset[fx.Node] = frozenset()


def node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, tuple(x if a is ... else a for a in args), kwargs)


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (aten.topk.default, (..., 2), "routing"),
        (aten.sort.default, (...,), "routing"),
        (aten.argmax.default, (...,), "routing"),
        (aten.nonzero.default, (...,), "depends on data"),
        (aten.masked_select.default, (..., ...), "depends on data"),
        (aten.unique_dim.default, (..., 0), "depends on data"),
        (aten._local_scalar_dense.default, (...,), "depends on data"),
        (aten.add_.Tensor, (..., 1), "writes to an input"),
        (aten.copy_.default, (..., ...), "writes to an input"),
        (torch.ops.higher_order.cond, (..., None, None, []), "higher-order"),
    ],
    ids=str,
)
def test_pinned(target: Any, args: tuple[Any, ...], reason: str) -> None:
    assert reason in why_pinned(node(target, *args), NOTHING)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.mm.default, (..., ...)),
        (aten.native_dropout.default, (..., 0.1, True)),  # replayed with its random state
        (aten.native_layer_norm.default, (..., [4], None, None, 1e-5)),
        (aten.view.default, (..., [4])),
        (operator.getitem, (..., 0)),
        (aten._native_batch_norm_legit_functional.default, (..., None, None, ..., ..., True, 0.1, 1e-5)),
    ],
    ids=str,
)
def test_free(target: Any, args: tuple[Any, ...]) -> None:
    assert why_pinned(node(target, *args), NOTHING) == ""


@pytest.mark.parametrize("size", [(2, 4), None])
def test_a_gather_is_pinned_where_its_size_depends_on_data(size: tuple[int, ...] | None) -> None:
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        gather = node(aten.index.Tensor, ..., [...])
        gather.meta["val"] = torch.empty(size or (shapes.create_unbacked_symint(), 4))
    assert why_pinned(gather, NOTHING) == ("" if size else "shape depends on data")


def test_a_collective_is_pinned() -> None:
    target = torch.ops._c10d_functional.all_reduce.default
    assert why_pinned(node(target, ..., "sum", "0"), NOTHING) == "collective"


def test_a_reader_of_an_updated_buffer_is_pinned() -> None:
    graph = fx.Graph()
    buffer, x = graph.placeholder("buffer"), graph.placeholder("x")
    reads = graph.call_function(aten.mul.Tensor, (x, buffer))
    through_view = graph.call_function(aten.sum.default, (graph.call_function(aten.slice.Tensor, (buffer, 0, 1)),))
    rest = graph.call_function(aten.mul.Tensor, (x, x))
    assert "buffer" in why_pinned(reads, frozenset({buffer}))
    assert "buffer" in why_pinned(through_view, frozenset({buffer}))
    assert why_pinned(rest, frozenset({buffer})) == ""


def test_batch_norm_may_run_again_where_it_reads_copies_of_its_statistics() -> None:
    """As door 1 captures it; a joint graph's reads what the step writes to before backward."""
    graph = fx.Graph()
    x, mean, var = (graph.placeholder(name) for name in ("x", "mean", "var"))
    copies = [graph.call_function(aten.clone.default, (buffer,)) for buffer in (mean, var)]
    target = aten._native_batch_norm_legit_functional.default
    captured, joint = (graph.call_function(target, (x, None, None, *of, True, 0.1, 1e-5)) for of in (copies, (mean, var)))
    assert why_pinned(captured, frozenset({mean, var})) == ""
    assert "buffer" in why_pinned(joint, frozenset({mean, var}))
