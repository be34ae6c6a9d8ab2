"""What Inductor is taken to fuse."""

from __future__ import annotations

import torch
from torch import fx

from remat.passes.joint_program import split_joint

aten = torch.ops.aten


def residual_stream(layers: int) -> tuple[fx.Graph, list[fx.Node]]:
    """x ← x + x₀ @ w, `layers` times; each x is also read by a reduction. The graph, and its x."""
    graph = fx.Graph()
    tensor = torch.empty(4, 4, device="meta")

    def call(op: torch._ops.OpOverload, *args: object) -> fx.Node:
        node = graph.call_function(op, args)
        node.meta["val"] = tensor if op is not aten.sum.default else tensor.sum()
        return node

    first, weight = graph.placeholder("primals_1"), graph.placeholder("primals_2")
    first.meta["val"] = weight.meta["val"] = tensor
    stream, sums = [first], []
    for _ in range(layers):
        stream.append(call(aten.add.Tensor, stream[-1], call(aten.mm.default, first, weight)))
        sums.append(call(aten.sum.default, stream[-1]))
    graph.output((*sums,))
    return graph, stream[1:]


def test_pointwise_results_for_pointwise_readers_are_not_stored() -> None:
    graph, stream = residual_stream(2)
    assert set(stream) <= split_joint(graph, 2, fuses=True).inlined
    assert not split_joint(graph, 2, fuses=False).inlined


def test_a_long_chain_is_stored_now_and_then() -> None:
    graph, stream = residual_stream(12)
    inlined = split_joint(graph, 12, fuses=True).inlined
    runs = "".join("i" if node in inlined else "." for node in stream[:-1]).split(".")
    assert 1 <= max(map(len, runs)) <= 3  # each adds a tensor to read, and four are the limit
