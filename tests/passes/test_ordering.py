"""The order of a joint graph."""

from __future__ import annotations

import operator

import torch
from torch import fx

from remat.passes.ordering import as_needed, just_in_time, parameters_first

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


def backward() -> fx.GraphModule:
    """Two late nodes read a view of a tanh, the second through an op that a compiler fuses, a third reads nothing of it."""
    graph = fx.Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    tanh = graph.call_function(aten.tanh.default, (x,), name="tanh")
    turned = graph.call_function(aten.t.default, (tanh,), name="t")
    first = graph.call_function(aten.mm.default, (tangent, turned), name="mm")
    between = graph.call_function(aten.exp.default, (first,), name="exp")
    fused = graph.call_function(aten.mul.Tensor, (between, turned), name="mul")
    second = graph.call_function(aten.mm.default, (fused, tanh), name="mm_1")
    graph.output((second, graph.call_function(aten.mm.default, (second, fused), name="mm_2")))
    return fx.GraphModule({}, graph)


def lines(module: fx.GraphModule) -> list[str]:
    return [f"{node.name} {' '.join(s.name for s in node.all_input_nodes)}" for node in module.graph.nodes if node.users]


def test_plans_and_graphs_have_what_needs_no_tangent_at_the_same_place() -> None:
    """A copy that autograd takes in forward stands first in the joint graph, and backward makes it when it is read."""
    graph = fx.Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    kept = graph.call_function(aten.clone.default, (x,))
    first = graph.call_function(aten.exp.default, (tangent,))
    second = graph.call_function(aten.mul.Tensor, (first, kept))
    unread = graph.call_function(aten.neg.default, (x,))
    graph.output((second, unread))
    assert as_needed([kept, first, second, unread], [second, unread], graph) == (first, kept, second, unread)
    module = fx.GraphModule(torch.nn.Module(), graph)
    just_in_time(module)
    run = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert run == [aten.exp.default, aten.clone.default, aten.mul.Tensor, aten.neg.default]


def test_items_come_with_the_op_that_they_are_of() -> None:
    """Until the last of them is taken, an op's tuple holds all of its results."""
    graph = fx.Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    norm = graph.call_function(aten.native_layer_norm.default, (x, [4], None, None, 1e-5))
    result, mean = (graph.call_function(operator.getitem, (norm, i), name=f"item_{i}") for i in range(2))
    first = graph.call_function(aten.mm.default, (tangent, result))
    graph.output((first, graph.call_function(aten.mul.Tensor, (first, mean))))
    module = fx.GraphModule({}, graph)
    just_in_time(module)
    module.graph.lint()
    names = [node.name for node in module.graph.nodes]
    assert names[names.index(norm.name) :][:3] == [norm.name, "item_0", "item_1"]


def test_a_repeated_op_has_no_items_that_nothing_reads() -> None:
    """`fx.Interpreter` frees a value after its last use: one without any stays to the end, and all that it is a view of."""
    graph = fx.Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    product = graph.call_function(aten.mm.default, (x, x), name="product")
    split = graph.call_function(aten.split.Tensor, (product, 2, 1))
    left, right = (graph.call_function(operator.getitem, (split, i)) for i in range(2))
    first = graph.call_function(aten.mul.Tensor, (tangent, left))
    graph.output((first, graph.call_function(aten.mul.Tensor, (first, right))))
    module = fx.GraphModule({}, graph)
    values = torch.randn(4, 4), torch.randn(4, 2)
    expected = module(*values)
    just_in_time(module, {"product": 1})
    assert len(module.graph.find_nodes(op="call_function", target=aten.split.Tensor)) == 2
    assert all(node.users for node in module.graph.nodes if node.op == "call_function")
    assert all(torch.equal(a, b) for a, b in zip(module(*values), expected, strict=True))


def test_what_repeats_is_computed_for_each_node_that_reads_it() -> None:
    once, again, fused = backward(), backward(), backward()
    just_in_time(once)
    assert lines(once) == lines(backward())
    just_in_time(again, {"tanh": 2})
    assert lines(again) == [
        *("x ", "tangents_1 ", "tanh x", "t tanh", "mm tangents_1 t", "exp mm"),
        *("tanh_again x", "t_again tanh_again", "mul exp t_again"),
        *("tanh_again_1 x", "mm_1 mul tanh_again_1", "mm_2 mm_1 mul"),
    ]
    just_in_time(fused, {"tanh": 2}, ["mul"])
    assert lines(fused) == [
        *("x ", "tangents_1 ", "tanh x", "t tanh", "mm tangents_1 t", "exp mm"),
        *("tanh_again x", "t_again tanh_again", "mul exp t_again", "mm_1 mul tanh_again"),
        *("tanh_again_1 x", "t_again_1 tanh_again_1", "mul_again exp t_again_1", "mm_2 mm_1 mul_again"),
    ]
    values = torch.randn(3, 3), torch.randn(3, 3)
    for module in (once, again, fused):
        assert all(torch.equal(a, b) for a, b in zip(module(*values), backward()(*values), strict=True))


def test_each_reader_has_its_own_copy_of_what_a_compiler_would_store() -> None:
    """A GELU's product with what comes after it reads the same tanh as its gradient does."""
    graph = fx.Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    tanh = graph.call_function(aten.tanh.default, (x,), name="tanh")
    more = graph.call_function(aten.add.Tensor, (tanh, 1.0), name="more")
    gelu = graph.call_function(aten.mul.Tensor, (x, more), name="gelu")
    first = graph.call_function(aten.mm.default, (tangent, gelu), name="first")
    slope = graph.call_function(aten.mul.Tensor, (tanh, tangent), name="slope")
    second = graph.call_function(aten.mul.Tensor, (slope, more), name="second")
    graph.output((first, second))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(3, 3)
    module = fx.GraphModule({}, graph)
    values = torch.randn(3, 3), torch.randn(3, 3)
    expected = module(*values)
    just_in_time(module, inlined=["tanh", "more", "slope"])
    assert lines(module)[2:] == [
        *("tanh x", "more tanh", "gelu x more", "first tangents_1 gelu"),
        *("tanh_again x", "slope tanh_again tangents_1"),
        *("tanh_again_1 x", "more_again tanh_again_1", "second slope more_again"),
    ]
    assert all(torch.equal(a, b) for a, b in zip(module(*values), expected, strict=True))


def test_copies_for_each_reader_end_where_they_would_be_too_many() -> None:
    graph = fx.Graph()
    x, tangent = graph.placeholder("x"), graph.placeholder("tangents_1")
    y = graph.call_function(aten.exp.default, (x,))
    for _ in range(20):  # twice as many ways to it each time
        y = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.add.Tensor, (y, 1.0)), y))
    graph.output(graph.call_function(aten.mul.Tensor, (tangent, y)))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(3, 3)
    module = fx.GraphModule({}, graph)
    values = torch.randn(3, 3), torch.randn(3, 3)
    expected = module(*values)
    just_in_time(module, inlined=[node.name for node in graph.nodes if node.op == "call_function" and tangent not in node.args])
    assert len(module.graph.nodes) < 200
    assert torch.equal(module(*values), expected)
