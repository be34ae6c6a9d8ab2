"""What Inductor is taken to fuse."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from remat.devices import CPU, CUDA, DeviceProfile
from remat.passes.joint_program import joint_program, split_joint
from remat.program import Decision

aten, prims = torch.ops.aten, torch.ops.prims


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


def test_what_a_reduction_and_its_reader_share_is_not_stored_however_much_it_reads() -> None:
    """As in the gradient of a softmax, y ← g − Σ g with g ← Π xᵢ."""
    graph = fx.Graph()
    tensor = torch.empty(4, 4, device="meta")

    def call(op: torch._ops.OpOverload, *args: object, value: torch.Tensor = tensor) -> fx.Node:
        node = graph.call_function(op, args)
        node.meta["val"] = value
        return node

    product, *factors = [graph.placeholder(f"primals_{i}") for i in range(6)]
    for node in (product, *factors):
        node.meta["val"] = tensor
    for factor in factors:
        product = call(aten.mul.Tensor, product, factor)
    total = call(aten.sum.dim_IntList, product, [1], True, value=tensor[:, :1])
    difference = call(aten.sub.Tensor, product, total)
    output = graph.output((difference,))
    assert product in split_joint(graph, 1, fuses=True).inlined
    with graph.inserting_before(output):
        output.args = ((difference, call(aten.add.Tensor, product, 1.0)),)
    assert product not in split_joint(graph, 2, fuses=True).inlined


def dropped_out(dtype: torch.dtype) -> tuple[fx.Graph, list[str]]:
    """y ← ([draw > 0.1] · tanh(x)) @ w, and two gradients, with Inductor's draw cast to `dtype`; the names of draw, mask and
    tanh."""
    from torch._inductor import inductor_prims

    graph = fx.Graph()
    real = torch.empty(64, 64)

    def call(op: torch._ops.OpOverload, *args: object, value: torch.Tensor = real) -> fx.Node:
        node = graph.call_function(op, args)
        node.meta["val"] = value
        return node

    x, weight, tangent = (graph.placeholder(name) for name in ("primals_1", "primals_2", "tangents_1"))
    for node in (x, weight, tangent):
        node.meta["val"] = real
    seeds = call(inductor_prims.seeds, 1, torch.device("cpu"), value=torch.empty(1))
    seed = call(inductor_prims.lookup_seed, seeds, 0, value=torch.empty(()))
    draw = call(inductor_prims.random, [64, 64], seed, "rand")
    drawn = draw if dtype is real.dtype else call(prims.convert_element_type.default, draw, dtype, value=real.to(dtype))
    mask = call(aten.gt.Scalar, drawn, 0.1, value=real > 0.1)
    tanh = call(aten.tanh.default, x)
    kept = call(aten.mul.Tensor, mask, tanh)
    y = call(aten.mm.default, kept, weight)
    gradient = call(aten.mm.default, tangent, weight)
    graph.output((y, call(aten.mul.Tensor, gradient, mask), call(aten.mm.default, kept, tangent)))
    return graph, [node.name for node in (draw, mask, tanh)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "mask", "tanh_costs"), [(CPU, Decision.RECOMPUTE, True), (CUDA, None, False)])
def test_what_a_draw_and_what_is_fused_cost(
    device: DeviceProfile, mask: Decision | None, tanh_costs: bool, dtype: torch.dtype
) -> None:
    graph, names = dropped_out(dtype)
    program = joint_program(graph, split_joint(graph, 1, fuses=True), device, {})
    ops = {op.name: op for op in program.forward}
    draw, comparison, tanh = (ops[name] for name in names)
    assert comparison.pin is mask
    assert comparison.cost_us == 0
    assert (tanh.cost_us > 0) == tanh_costs
    assert not tanh_costs or draw.cost_us > 3 * tanh.cost_us
    stored = {value.name: value.passing for value in program.values}
    assert [stored[name] for name in names] == [64 * 64 * 4, 0, 0]
