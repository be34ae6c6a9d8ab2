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


@torch.no_grad()
def check_embeddings(graph: fx.Graph) -> None:
    """Raises CaptureError where a row is looked up that an embedding does not have. Known is what follows from the sizes of
    inputs, as positions do, not what depends on their values."""
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        with _torch.no_dispatch_modes():
            rows = _value(node.args[1])
            ends = [] if rows is None or not rows.numel() else [int(rows.min()), int(rows.max())]
        size = node.args[0].meta["val"].shape[0]
        for row in ends:
            if not 0 <= row < size:
                where = module_path(node) or "an embedding"
                raise CaptureError(f"the input is too long: {where} has {size} rows, and is asked for row {row}")


def _value(node: fx.Node) -> torch.Tensor | None:
    """The whole numbers that a node always gives; None where they depend on inputs, or there are none."""
    needed, ahead = set[fx.Node](), [node]
    while ahead:
        source = ahead.pop()
        if source in needed:
            continue
        if not _counts(source):
            return None
        needed.add(source)
        ahead += source.all_input_nodes
    values: dict[fx.Node, torch.Tensor] = {}
    for source in sorted(needed):
        args, kwargs = fx.node.map_arg((source.args, dict(source.kwargs)), values.__getitem__)
        target: Any = source.target
        try:
            values[source] = target(*args, **kwargs)
        except (IndexError, RuntimeError):  # as in the model, at that size
            return None
    return values[node]


def _counts(node: fx.Node) -> bool:
    """Whether a node makes whole numbers, not too many, and not at random."""
    value, target = node.meta.get("val"), node.target
    if node.op != "call_function" or not isinstance(target, _torch.OpOverload) or not isinstance(value, torch.Tensor):
        return False
    if value.is_floating_point() or value.is_complex() or value.numel() > _MOST or value.device.type == "meta":
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags
