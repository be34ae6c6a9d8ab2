"""What a capture finds: one functional ATen graph, and where each of its inputs comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from remat._torch import pytree
from remat.functions import FunctionCall
from remat.state import tensor_key


@dataclass(frozen=True)
class Source:
    """Where a placeholder's tensor comes from: a parameter, buffer, other attribute or lifted constant by name, or flat input
    `index`."""

    kind: str
    name: str = ""
    index: int = -1


@dataclass(frozen=True)
class Captured:
    """A model's forward as one functional ATen graph.

    graph: placeholders in the order of `sources`; the output is the tuple of flat outputs, then the new values of
        mutated inputs.
    outputs: for each flat output of the model, its index among the graph's outputs, or the constant it always is.
    mutations: (index among the graph's outputs, source of the input it belongs to).
    attributes: of each tensor that is an attribute of the model's and neither parameter nor buffer, what it has to be like.
    held: attributes of parameters (by both names) that autograd functions are given.
    """

    graph: fx.Graph
    sources: tuple[Source, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    outputs: tuple[tuple[int, Any], ...]
    mutations: tuple[tuple[int, Source], ...]
    constants: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    held: dict[tuple[str, str], Any]

    def fits(self, model: nn.Module) -> bool:
        """Whether the graph can read the attributes of the model as they are now."""
        there = all(tensor_key(attribute(model, name)) == key for name, key in self.attributes.items())
        return there and all(attribute(model, f"{name}.{own}") is value for (name, own), value in self.held.items())

    def read_by_functions(self) -> list[torch.Tensor]:
        """What autograd functions read beside what they are given."""
        return [tensor for node in self.graph.nodes if isinstance(node.target, FunctionCall) for tensor in node.target.reads]

    def output_of(self, results: Sequence[Any]) -> Any:
        """The model's output, from what the graph returns."""
        return pytree.tree_unflatten([constant if i < 0 else results[i] for i, constant in self.outputs], self.out_spec)


def tensor_of(source: Source, model: nn.Module, flat: list[Any], constants: dict[str, torch.Tensor]) -> Any:
    """The tensor of a call with these leaves that a placeholder stands for."""
    if source.kind == "input":
        return flat[source.index]
    return constants[source.name] if source.kind == "constant" else attribute(model, source.name)


def attribute(module: nn.Module, target: str) -> Any:
    """What is at a path of names; None if nothing is."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
