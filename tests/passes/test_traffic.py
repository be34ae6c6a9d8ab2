"""What kernels read and write more where a value is not stored."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from remat.passes.joint_program import split_joint
from remat.passes.traffic import extra_bytes

aten = torch.ops.aten
SIDE = 64
BYTES = SIDE * SIDE * 4


class Step:
    """A joint graph of square float32 matrices, node by node."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str) -> fx.Node:
        return self._known(self.graph.placeholder(name))

    def call(self, op: torch._ops.OpOverload, *args: fx.Node) -> fx.Node:
        return self._known(self.graph.call_function(op, args))

    def products(self, node: fx.Node, count: int) -> fx.Node:
        """The last of so many products, each of the one before: what follows is far away."""
        for _ in range(count):
            node = self.call(aten.mm.default, node, node)
        return node

    def extra(self, forward_outputs: int, *outputs: fx.Node) -> dict[fx.Node, int]:
        self.graph.output(outputs)
        halves = split_joint(self.graph, forward_outputs, fuses=True)
        return extra_bytes(halves.forward, halves.backward, halves.inlined)

    @staticmethod
    def _known(node: fx.Node) -> fx.Node:
        node.meta["val"] = torch.empty(SIDE, SIDE, device="meta")
        return node


def test_a_link_of_a_chain_costs_one_more_read_wherever_it_stands() -> None:
    step = Step()
    stream, gradient = [step.input("primals_1")], step.input("tangents_1")
    for _ in range(4):
        branch = step.products(step.call(aten.sin.default, stream[-1]), 12)
        stream.append(step.call(aten.add.Tensor, stream[-1], branch))
    y = step.products(step.call(aten.sin.default, stream[-1]), 1)
    for link in reversed(stream[1:]):
        gradient = step.products(step.call(aten.mul.Tensor, gradient, link), 12)
    extra = step.extra(1, y, gradient)
    assert [extra[link] for link in stream[1:-1]] == [BYTES] * 3  # one read more by each other kernel, and not written


@pytest.mark.parametrize("reads_anyway", [True, False])
def test_what_a_kernel_reads_anyway_costs_nothing(reads_anyway: bool) -> None:
    step = Step()
    a, b, tangent = (step.input(name) for name in ("primals_1", "primals_2", "tangents_1"))
    made = step.products(a, 1)
    active = step.call(aten.sin.default, made)
    y = step.products(step.call(aten.mul.Tensor, active, b), 12)
    gradient = step.products(tangent, 12)
    of_b = step.call(aten.mul.Tensor, gradient, active)
    of_a = step.call(aten.mul.Tensor, step.products(gradient, 0 if reads_anyway else 12), made)
    assert step.extra(1, y, of_b, of_a)[active] == -BYTES * (2 if reads_anyway else 1)


def test_values_that_backward_reads_inside_others_are_written_and_read_where_they_are_stored() -> None:
    step = Step()
    x, tangent = step.input("primals_1"), step.input("tangents_1")
    inner = step.call(aten.sin.default, x)
    outer = step.call(aten.exp.default, inner)
    y = step.products(step.call(aten.mul.Tensor, outer, x), 12)
    assert step.extra(1, y, step.call(aten.mul.Tensor, step.products(tangent, 12), outer))[inner] == -2 * BYTES
