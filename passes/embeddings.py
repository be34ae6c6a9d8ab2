"""Look up positions as the model will: on tensors without values a table never ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from remat import _torch
from remat.errors import CaptureError
from remat.passes.provenance import module_path

aten = torch.ops.aten


_MOST = 2**20  # numbers in a tensor that are worth a look


def check_embeddings(graph: fx.Graph) -> None:
    """Raises CaptureError where a row is looked up that an embedding does not have. Known is what follows from the sizes of
    inputs, as positions do, not what depends on their values."""
    found: dict[fx.Node, torch.Tensor | None] = {}
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        rows = _value(node.args[1], found)
        size = node.args[0].meta["val"].shape[0]
        if rows is not None and rows.numel() and int(rows.max()) >= size:
            where, row = module_path(node) or "an embedding", int(rows.max())
            raise CaptureError(f"the input is too long: {where} has {size} rows, and is asked for row {row}")


def _value(node: fx.Node, found: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    """The whole numbers that a node always gives; None where they depend on inputs."""
    if node not in found:
        found[node] = None
        sources = {source: _value(source, found) for source in node.all_input_nodes} if _counts(node) else {node: None}
        if all(value is not None for value in sources.values()):
            with _torch.no_dispatch_modes():
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), sources.__getitem__)
                target: Any = node.target
                found[node] = target(*args, **kwargs)
    return found[node]


def _counts(node: fx.Node) -> bool:
    """Whether a node makes whole numbers, not too many, and not at random."""
    value, target = node.meta.get("val"), node.target
    if node.op != "call_function" or not isinstance(target, _torch.OpOverload) or not isinstance(value, torch.Tensor):
        return False
    if value.is_floating_point() or value.is_complex() or value.numel() > _MOST or value.device.type == "meta":
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags
