"""Views share the storage of what they view."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from remat.passes.aliasing import is_view, made_bytes, owner, storage_bytes, storage_roots

aten = torch.ops.aten

VIEWS = [
    (aten.view.default, ([2, 2],)),
    (aten.t.default, ()),
    (aten.transpose.int, (0, 1)),
    (aten.slice.Tensor, (0, 0, 1)),
    (aten.expand.default, ([4, 4],)),
    (aten.detach.default, ()),
    (aten._unsafe_view.default, ([2, 2],)),
    (aten.select.int, (0, 0)),
]
FRESH = [
    (aten.clone.default, ()),
    (aten.relu.default, ()),
    (aten.add.Tensor, (1,)),
    (aten.add_.Tensor, (1,)),  # writes to its input: no new view of it
    (aten.native_dropout.default, (0.5, True)),
]


@pytest.mark.parametrize(("target", "args"), VIEWS, ids=str)
def test_views(target: Any, args: tuple[Any, ...]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(target, (x, *args))
    assert is_view(view)
    assert storage_roots(graph) == {x: x, view: x}


@pytest.mark.parametrize(("target", "args"), FRESH, ids=str)
def test_what_is_no_view(target: Any, args: tuple[Any, ...]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not is_view(x)
    assert not is_view(graph.call_function(target, (x, *args)))


def test_a_view_of_a_constant_is_a_tensor_of_its_own() -> None:
    graph = fx.Graph()
    made = graph.call_function(aten._conj.default, (1j,))
    seen = graph.call_function(aten.view.default, (made, [1]))
    assert not is_view(made)
    assert owner(seen) is made
    assert storage_roots(graph) == {made: made, seen: made}


def test_a_view_of_a_view_belongs_to_the_first_storage() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.relu.default, (x,))
    first = graph.call_function(aten.t.default, (made,))
    second = graph.call_function(aten.view.default, (first, [-1]))
    roots = storage_roots(graph)
    assert roots[first] is roots[second] is roots[made] is made


@pytest.mark.parametrize("target", [aten.split.Tensor, aten.unsafe_split.Tensor, aten.unsafe_chunk.default], ids=str)
def test_items_of_a_split_are_views_and_items_of_an_op_are_its_own(target: Any) -> None:
    tensor = torch.zeros(4)
    assert target(tensor, 2)[0].data_ptr() == tensor.data_ptr()
    graph = fx.Graph()
    x = graph.placeholder("x")
    split = graph.call_function(target, (x, 2))
    part = graph.call_function(operator.getitem, (split, 0))
    norm = graph.call_function(aten.native_layer_norm.default, (x, [4], None, None, 1e-5))
    item = graph.call_function(operator.getitem, (norm, 1))
    roots = storage_roots(graph)
    assert is_view(part)
    assert roots[part] is x
    assert not is_view(item)
    assert roots[item] is norm


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.copy.default, (torch.ones(8, 4),)),
        (aten.slice_scatter.default, (torch.ones(2, 4), 0, 0, 2)),
        (aten.select_scatter.default, (torch.ones(4), 0, 1)),
        (aten.diagonal_scatter.default, (torch.ones(4),)),
        (aten.as_strided_scatter.default, (torch.ones(2, 2), [2, 2], [8, 1])),
        (aten.relu.default, ()),
        (aten.clone.default, ()),
        (aten.index_put.default, ([torch.tensor([1])], torch.ones(4))),
    ],
    ids=str,
)
@pytest.mark.parametrize("view", [torch.zeros(8, 8)[:, :4], torch.zeros(8, 1).expand(8, 4)], ids=["slice", "expand"])
def test_what_keeps_the_strides_of_a_view_copies_all_that_it_views(
    target: Any, args: tuple[Any, ...], view: torch.Tensor
) -> None:
    graph = fx.Graph()
    base = graph.placeholder("base")
    base.meta["val"] = view._base
    viewed = graph.call_function(aten.slice.Tensor, (base,))
    node = graph.call_function(target, (viewed, *args))
    node.meta["val"] = target(view, *args)
    assert made_bytes(node) == node.meta["val"].untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(4, 5), 80),
        (torch.empty(4, 5, dtype=torch.bfloat16), 40),
        (torch.empty(0, 5), 0),
        (torch.empty(4, 5).t(), 80),
        (torch.empty(5).expand(4, 5), 20),
        (torch.empty(()), 4),
        (torch.empty(3, dtype=torch.bool), 3),
        (None, 0),
        (7, 0),
    ],
)
def test_storage_bytes(tensor: Any, expected: int) -> None:
    assert storage_bytes(tensor) == expected
