"""Regions: the graph before and after, and that it computes the same."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from remat.passes.regions import RegionGraph, Stretch, form_regions

aten = torch.ops.aten


def graph() -> fx.Graph:
    """(relu(x @ w)).t() @ v, and the row sums of relu as a second result."""
    g = fx.Graph()
    x, w, v = (g.placeholder(name) for name in "xwv")
    mm = g.call_function(aten.mm.default, (x, w), name="mm")
    relu = g.call_function(aten.relu.default, (mm,), name="relu")
    turned = g.call_function(aten.t.default, (relu,), name="t")
    second = g.call_function(aten.mm.default, (turned, v), name="mm_1")
    total = g.call_function(aten.sum.dim_IntList, (relu, [1]), name="sum_1")
    g.output((second, total))
    return g


def text(g: fx.Graph) -> str:
    """One line for each node."""
    return "\n".join(node.format_node() or "" for node in g.nodes if node.op != "output").replace("torch.ops.", "") + "\n"


STRETCH = Stretch(("mm", "relu", "t"), frozenset({"mm", "t"}))


def formed() -> tuple[fx.Graph, tuple[RegionGraph, ...]]:
    return form_regions(graph(), [STRETCH])


def test_before_and_after() -> None:
    assert (
        text(graph())
        == """\
%x : [num_users=1] = placeholder[target=x]
%w : [num_users=1] = placeholder[target=w]
%v : [num_users=1] = placeholder[target=v]
%mm : [num_users=1] = call_function[target=aten.mm.default](args = (%x, %w), kwargs = {})
%relu : [num_users=2] = call_function[target=aten.relu.default](args = (%mm,), kwargs = {})
%t : [num_users=1] = call_function[target=aten.t.default](args = (%relu,), kwargs = {})
%mm_1 : [num_users=1] = call_function[target=aten.mm.default](args = (%t, %v), kwargs = {})
%sum_1 : [num_users=1] = call_function[target=aten.sum.dim_IntList](args = (%relu, [1]), kwargs = {})
"""
    )
    outer, (region,) = formed()
    assert (
        text(outer)
        == """\
%x : [num_users=1] = placeholder[target=x]
%w : [num_users=1] = placeholder[target=w]
%v : [num_users=1] = placeholder[target=v]
%region_0 : [num_users=2] = call_module[target=region_0](args = (%x, %w), kwargs = {})
%relu : [num_users=1] = call_function[target=operator.getitem](args = (%region_0, 0), kwargs = {})
%t : [num_users=1] = call_function[target=operator.getitem](args = (%region_0, 1), kwargs = {})
%mm_1 : [num_users=1] = call_function[target=aten.mm.default](args = (%t, %v), kwargs = {})
%sum_1 : [num_users=1] = call_function[target=aten.sum.dim_IntList](args = (%relu, [1]), kwargs = {})
"""
    )
    assert (
        text(region.graph)
        == """\
%x : [num_users=1] = placeholder[target=x]
%w : [num_users=1] = placeholder[target=w]
%mm : [num_users=1] = call_function[target=aten.mm.default](args = (%x, %w), kwargs = {})
%relu : [num_users=2] = call_function[target=aten.relu.default](args = (%mm,), kwargs = {})
%t : [num_users=1] = call_function[target=aten.t.default](args = (%relu,), kwargs = {})
"""
    )


def test_a_region_knows_its_inputs_outputs_and_decisions() -> None:
    _, (region,) = formed()
    assert region.name == "region_0"
    assert region.inputs == ("x", "w")
    assert region.outputs == ("relu", "t")
    assert region.dropped == {"mm", "t"}
    decided = {n.name: n.meta["recompute"] for n in region.graph.nodes if n.op == "call_function"}
    assert decided == {
        "mm": CheckpointPolicy.MUST_RECOMPUTE,
        "relu": CheckpointPolicy.MUST_SAVE,
        "t": CheckpointPolicy.MUST_RECOMPUTE,
    }


def test_it_computes_the_same() -> None:
    outer, regions = formed()
    modules = {region.name: fx.GraphModule({}, region.graph) for region in regions}
    x, w, v = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 2)
    expected = fx.GraphModule({}, graph())(x, w, v)
    for a, b in zip(fx.GraphModule(modules, outer)(x, w, v), expected, strict=True):
        assert torch.equal(a, b)


def test_no_stretches_leave_the_graph() -> None:
    outer, regions = form_regions(graph(), [])
    assert text(outer) == text(graph())
    assert regions == ()


def test_two_regions_in_a_row() -> None:
    outer, regions = form_regions(graph(), [STRETCH, Stretch(("mm_1", "sum_1"), frozenset({"sum_1"}))])
    assert [n.target for n in outer.nodes if n.op == "call_module"] == ["region_0", "region_1"]
    assert regions[1].inputs == ("t", "v", "relu")


def test_the_given_graph_is_left_as_it_was() -> None:
    original = graph()
    before = text(original)
    form_regions(original, [STRETCH])
    assert text(original) == before
    assert not any("recompute" in node.meta for node in original.nodes)
