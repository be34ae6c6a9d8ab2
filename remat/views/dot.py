"""Rewritten graphs in Graphviz' language: a box for each op, in the colour of its decision, and a frame around each region."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from remat.errors import RematError
from remat.passes.provenance import module_path
from remat.session import CompiledPlan

_FILL = {
    CheckpointPolicy.MUST_RECOMPUTE: "#fed7aa",
    CheckpointPolicy.PREFER_RECOMPUTE: "#fed7aa",
    CheckpointPolicy.MUST_SAVE: "#bfdbfe",
    CheckpointPolicy.PREFER_SAVE: "#bfdbfe",
}


def to_dot(graph: fx.GraphModule | CompiledPlan) -> str:
    """A graph of remat in DOT: a module from `optimize`, or a compiled plan, whose two graphs stand side by side.

    Orange ops are computed again in backward, blue ones saved. Raises RematError for a module that has captured nothing yet.
    """
    lines = ["digraph remat {", ' node [shape=box, style=filled, fillcolor=white, fontname="sans-serif", fontsize=10];']
    if isinstance(graph, CompiledPlan):
        for name, half in (("forward", graph.forward), ("backward", graph.backward)):
            lines += [*_frame(name, f"{name}/", half)]
        lines += _between(graph)
    else:
        if not any(node.op != "placeholder" for node in graph.graph.nodes):
            raise RematError("nothing is captured yet, so there is no graph; call the module once, or give optimize() inputs")
        lines += _graph(graph, "")
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


def _between(graph: CompiledPlan) -> Iterator[str]:
    """What backward takes over from forward has the same name there."""
    made = {node.name for node in graph.forward.graph.nodes}
    for node in graph.backward.graph.find_nodes(op="placeholder"):
        if node.name in made:
            yield f" {_quoted(f'forward/{node.name}')} -> {_quoted(f'backward/{node.name}')} [style=dashed];"


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
