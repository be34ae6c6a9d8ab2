"""Which nodes draw random numbers. Decided by the op's tag and arguments, never by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from remat._torch import OpOverload
from remat.functions import FunctionCall

_TORCH = ("aten", "prims", "prim", "remat", "mkldnn", "quantized", "torchvision")


def is_random(node: fx.Node) -> bool:
    """True if running the node advances a random number generator.

    An op tagged `nondeterministic_seeded` that takes a drop probability draws only when that is above zero
    (`scaled_dot_product_attention(dropout_p=0.0)` does not).
    """
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    probability = argument(node, "dropout_p")
    if probability is None:
        probability = argument(node, "dropout")
    return not (isinstance(probability, int | float) and probability == 0)


def may_draw(node: fx.Node) -> bool:
    """`is_random`, or an op or autograd function from outside of torch, which may draw without its author having said so."""
    is_foreign = isinstance(node.target, OpOverload) and node.target.namespace not in _TORCH
    return is_foreign or isinstance(node.target, FunctionCall) or is_random(node)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erase what computes nothing that is returned. What may draw stays: it moves a generator on, from which later ops draw."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or may_draw(node))


def argument(node: fx.Node, name: str) -> Any:
    """What an op is called with by the name that its schema has for it; None if it takes nothing of that name."""
    if name in node.kwargs:
        return node.kwargs[name]
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[index] if index < len(node.args) else argument.default_value
    return None
