"""The layout that Inductor gives the images of convolutions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from remat._torch import GraphLowering, pytree
from remat.passes.aliasing import storage_bytes

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def prefers_channels_last(graph: fx.Graph, backward: Collection[fx.Node]) -> bool:
    """Whether Inductor lays out images with their channels last, which it decides by the convolutions of forward: those of a
    joint graph that are not of `backward`."""
    if not any(is_convolution(node) for node in graph.nodes):
        return False
    forward = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output" and node not in backward and all(source in copies for source in node.all_input_nodes):
            copies[node] = forward.node_copy(node, copies.__getitem__)
    module = fx.GraphModule(graph.owning_module or torch.nn.Module(), forward)
    return GraphLowering.decide_layout_opt(module, is_inference=False)


def is_convolution(node: fx.Node) -> bool:
    """True for a convolution and for its gradients."""
    return node.target in _CONVOLUTIONS


def channels_last(arguments: Any) -> Any:
    """Arguments of an op, in any structure, with images and weights laid out like that."""
    return pytree.tree_map_only(torch.Tensor, _restrided, arguments)


def copied_bytes(node: fx.Node) -> int:
    """Of the graph's inputs that a convolution reads: they are copied for it, and again for its gradients."""
    values = [source.meta.get("val") for source in node.all_input_nodes if source.op == "placeholder"]
    return sum(storage_bytes(value) for value in values if isinstance(value, torch.Tensor) and _restrided(value) is not value)


def _restrided(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return torch.empty_like(tensor, memory_format=torch.channels_last)
