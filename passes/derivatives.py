"""Ops of a forward graph whose gradients the model computes otherwise than the op in the graph would."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from remat.functions import TENSOR, FunctionCall
from remat.passes.randomness import argument

aten = torch.ops.aten

_ELU = (aten.elu.default, aten.celu.default)
_IN_PLACE = (aten.elu_.default, aten.celu_.default, aten.selu_.default)


class FromResult(torch.autograd.Function):
    """An ELU that was in place: no input is left for its backward, which computes from the result, with other last bits."""

    @staticmethod
    def forward(ctx: Any, op: Any, x: torch.Tensor, alpha: float, *others: float) -> torch.Tensor:
        result: torch.Tensor = op(x, alpha, *others)
        ctx.save_for_backward(result)
        ctx.constants = alpha, *(others or (1.0, 1.0 / torch.tensor(alpha).item()))  # CELU's, from derivatives.yaml
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (result,) = ctx.saved_tensors
        found = aten.elu_backward.default(gradient, *ctx.constants, True, result)
        return None, found, *(None for _ in ctx.needs_input_grad[2:])


def elu_from_results(graph: fx.Graph, exported: fx.Graph) -> None:
    """Replace each ELU of a functional graph that was in place in the exported one, in place."""
    before = {node.name: node.target for node in exported.nodes}
    for node in [node for node in graph.nodes if node.target in _ELU]:
        sources = node.meta.get("from_node")
        if not sources or before.get(sources[-1].name) not in _IN_PLACE:
            continue
        names = ("alpha",) if node.target is aten.celu.default else ("alpha", "scale", "input_scale")
        arguments = node.target, TENSOR, *(argument(node, name) for name in names)
        with graph.inserting_after(node):
            call = graph.call_function(FunctionCall(FromResult, arguments, ()), (node.args[0],))
        with graph.inserting_after(call):
            result = graph.call_function(operator.getitem, (call, 0))
        call.meta, result.meta = {**node.meta, "val": (node.meta["val"],)}, node.meta
        node.replace_all_uses_with(result)
        graph.erase_node(node)
