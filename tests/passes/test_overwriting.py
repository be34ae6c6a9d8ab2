"""Storages that kernels write over."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch
from torch import fx

from remat.passes.overwriting import overwritten

aten = torch.ops.aten
Step = Callable[..., fx.Node]


def taken(
    build: Callable[[Step, fx.Node], None], inlined: Collection[str] = (), kept: Collection[str] = (), device: str = "meta"
) -> dict[str, tuple[str, ...]]:
    """By name what the nodes lie over that `build` makes of a product of 8 × 8 values. Views are read where they are."""
    graph = fx.Graph()

    def step(op: Callable[..., torch.Tensor], *args: object, name: str) -> fx.Node:
        node = graph.call_function(op, args, name=name)
        node.meta["val"] = op(*fx.map_arg(args, lambda source: source.meta["val"]))
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 8, device=device)
    build(step, step(aten.mm.default, x, x, name="product"))
    nodes = [node for node in graph.nodes if node.op == "call_function"]

    def readers(node: fx.Node) -> list[fx.Node]:
        through = [user.target is aten.t.default or user.name in inlined for user in node.users]
        return [r for user, on in zip(node.users, through, strict=True) for r in (readers(user) if on else [user])]

    hidden = {node for node in nodes if node.name in inlined}
    found = overwritten(nodes, hidden, {node: readers(node) for node in nodes}, {n for n in nodes if n.name in kept})
    return {node.name: tuple(source.name for source in sources) for node, sources in found.items()}


def test_a_kernel_writes_over_what_nothing_else_reads() -> None:
    def build(step: Step, product: fx.Node) -> None:
        first = step(aten.mul.Tensor, product, 2.0, name="first")
        step(aten.exp.default, first, name="second")

    assert taken(build) == {"first": ("product",), "second": ("first",)}
    assert taken(build, kept=("product",)) == {"second": ("first",)}
    assert taken(build, inlined=("first",)) == {"first": ("product",), "second": ("first", "product")}


def test_one_that_runs_before_on_the_way_does_not_matter_and_one_beside_does() -> None:
    def before(step: Step, product: fx.Node) -> None:
        total = step(aten.sum.dim_IntList, product, [1], True, name="total")
        step(aten.sub.Tensor, product, total, name="result")

    def beside(step: Step, product: fx.Node) -> None:
        step(aten.mm.default, product, product, name="square")
        step(aten.mul.Tensor, product, 2.0, name="result")

    assert taken(before) == {"result": ("product",)}
    assert taken(before, device="cpu") == {}  # the loop over rows holds both, and writes over nothing
    assert taken(beside) == {}


def test_a_stored_logarithm_splits_the_loop_of_a_log_softmax_on_a_cpu() -> None:
    def build(step: Step, product: fx.Node) -> None:
        total = step(aten.sum.dim_IntList, product, [1], True, name="total")
        log = step(aten.log.default, total, name="log")
        step(aten.sub.Tensor, product, log, name="result")

    assert taken(build, inlined=("log",), device="cpu")["result"] == ("product",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_storage_of_another_dtype_is_not_written_over(dtype: torch.dtype) -> None:
    def build(step: Step, product: fx.Node) -> None:
        step(torch.ops.prims.convert_element_type.default, product, dtype, name="cast")

    assert taken(build) == ({"cast": ("product",)} if dtype is torch.float32 else {})


def test_elements_in_other_places_are_not_written_over() -> None:
    def build(step: Step, product: fx.Node) -> None:
        turned = step(aten.t.default, product, name="turned")
        step(aten.add.Tensor, product, turned, name="result")

    assert taken(build) == {}
