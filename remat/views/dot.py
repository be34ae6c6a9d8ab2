"""Rewritten graphs in Graphviz' language: a box for each op, in the colour of its decision, and a frame around each region."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from remat.errors import RematError
from remat.passes.provenance import module_path
from remat.planned import plans_of
from remat.session import CompiledPlan

_FILL = {
    CheckpointPolicy.MUST_RECOMPUTE: "#fed7aa",
    CheckpointPolicy.PREFER_RECOMPUTE: "#fed7aa",
    CheckpointPolicy.MUST_SAVE: "#bfdbfe",
    CheckpointPolicy.PREFER_SAVE: "#bfdbfe",
}


def to_dot(graph: Any) -> str:
    """Graphs of remat in DOT: of a model from `optimize` or `torch.compile`, or under `enable`, or of a compiled plan. Several
    stand side by side: forward and backward, blocks.

    Orange ops are computed again in backward, blue ones saved. Raises RematError for a model that has captured nothing yet, and
    for one that remat does not train.
    """
    if isinstance(graph, CompiledPlan):
        return dot_of({"forward": graph.forward, "backward": graph.backward})
    if isinstance(graph, fx.GraphModule):
        return dot_of({"": graph})
    found = plans_of(graph)
    if len(found) == 1:
        return dot_of(found[0].graphs)
    return dot_of({f"{i}/{name}": each for i, planned in enumerate(found) for name, each in planned.graphs.items()})


def dot_of(graphs: Mapping[str, fx.GraphModule]) -> str:
    """Graphs in DOT, several in frames with their names."""
    lines = ["digraph remat {", ' node [shape=box, style=filled, fillcolor=white, fontname="sans-serif", fontsize=10];']
    if not any(node.op != "placeholder" for graph in graphs.values() for node in graph.graph.nodes):
        raise RematError("nothing is captured yet, so there is no graph; call the module once, or give optimize() inputs")
    for name, module in graphs.items():
        lines += _graph(module, "") if len(graphs) == 1 else _frame(name, f"{name}/", module)
    for name in graphs:
        half = f"{name.removesuffix('forward')}backward"
        if name.endswith("forward") and half in graphs:
            lines += _between(graphs, name, half)
    return "\n".join([*lines, "}"]) + "\n"


def _frame(title: str, prefix: str, module: fx.GraphModule) -> list[str]:
    inner = [f" {line}" for line in _graph(module, prefix)]
    return [f" subgraph {_quoted(f'cluster {prefix}')} {{", f"  label={_quoted(title)};", *inner, " }"]


def _graph(module: fx.GraphModule, prefix: str) -> Iterator[str]:
    for node in module.graph.nodes:
        inner = getattr(module, str(node.target), None) if node.op == "call_module" else None
        if isinstance(inner, fx.GraphModule):
            yield from _frame(str(node.target), f"{prefix}{node.target}/", inner)
        yield f" {_quoted(prefix + node.name)} [label={_quoted(_label(node))}, fillcolor={_quoted(_fill(node))}];"
        for source in node.all_input_nodes:
            yield f" {_quoted(prefix + source.name)} -> {_quoted(prefix + node.name)};"


def _between(graphs: Mapping[str, fx.GraphModule], forward: str, backward: str) -> Iterator[str]:
    """What backward takes over from forward has the same name there."""
    made = {node.name for node in graphs[forward].graph.nodes}
    for node in graphs[backward].graph.find_nodes(op="placeholder"):
        if node.name in made:
            yield f" {_quoted(f'{forward}/{node.name}')} -> {_quoted(f'{backward}/{node.name}')} [style=dashed];"


def _label(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    shape = f"{'x'.join(map(str, value.shape))} {str(value.dtype)[6:]}" if isinstance(value, torch.Tensor) else ""
    op = str(node.target) if node.op == "call_function" else node.op
    return "\n".join(part for part in (node.name, op, shape, module_path(node)) if part)


def _fill(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return "#e5e7eb"
    decision: Any = node.meta.get("recompute")
    return _FILL.get(decision, "white")


def _quoted(text: str) -> str:
    return json.dumps(text)
