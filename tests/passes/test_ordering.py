"""The order of a joint graph."""

from __future__ import annotations

import torch
from torch import fx

from remat.passes.ordering import parameters_first

aten = torch.ops.aten


def test_a_weights_gradient_comes_before_that_of_its_input_and_collectives_stay() -> None:
    graph = fx.Graph()
    x, first, second, tangent = (graph.placeholder(name) for name in ("x", "first", "second", "tangent"))
    hidden = graph.call_function(aten.tanh.default, (graph.call_function(aten.mm.default, (x, first)),))
    y = graph.call_function(aten.mm.default, (hidden, second))
    scaled = graph.call_function(aten.mul.Tensor, (tangent, 2.0))
    of_hidden = graph.call_function(aten.mm.default, (scaled, graph.call_function(aten.t.default, (second,))))
    of_second = graph.call_function(aten.mm.default, (graph.call_function(aten.t.default, (hidden,)), scaled))
    of_product = graph.call_function(aten.tanh_backward.default, (of_hidden, hidden))
    of_x = graph.call_function(aten.mm.default, (of_product, graph.call_function(aten.t.default, (first,))))
    of_first = graph.call_function(aten.mm.default, (graph.call_function(aten.t.default, (x,)), of_product))
    reduced = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (of_first, "sum", "0"))
    waited = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (reduced,))
    graph.output((y, of_second, of_x, waited))
    parameters_first(graph, 1)
    graph.lint()
    order = {node: i for i, node in enumerate(graph.nodes)}
    assert order[of_second] == order[scaled] + 2  # after the transposed activation
    assert order[of_second] < order[of_hidden] < order[of_product] < order[of_x] < order[of_first] < order[reduced]
    assert order[waited] == order[reduced] + 1
