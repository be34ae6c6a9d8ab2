"""The rewritten graphs as a module that runs: regions are submodules, parameters attributes, and buffers are written back."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from remat.captured import Captured
from remat.passes.aliasing import is_view
from remat.passes.regions import RegionGraph
from remat.passes.transfers import is_mark, without_transfers
from remat.runtime import run_region
from remat.steps import compile_region

aten = torch.ops.aten


class Region(fx.GraphModule):
    """A checkpoint region: `runtime.run_region` in eager, `torch.utils.checkpoint` under torch.compile (AOT honours it)."""

    def __init__(self, region: RegionGraph) -> None:
        super().__init__({}, region.graph, "Region")
        self.program = compile_region(region.graph, region.dropped, region.repeats)
        self.saved = _saved_calls(region)
        self.body = fx.GraphModule({}, without_transfers(region.graph))

    def recompile(self) -> Any:
        return recompile_text_only(self)

    def forward(self, *inputs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return _checkpointed(self, inputs)
        if not torch.is_grad_enabled():
            return self.body(*inputs)
        return run_region(self.program, inputs)


def _checkpointed(region: Region, inputs: tuple[Any, ...]) -> Any:
    contexts = functools.partial(_selective_contexts, region.saved)
    return checkpoint(region.body, *inputs, use_reentrant=False, context_fn=contexts)


def _selective_contexts(saved: frozenset[tuple[str, int]]) -> Any:
    """Contexts for `checkpoint` that save the given calls, as (op, how many of that op ran before), and recompute the rest."""
    seen: Counter[tuple[bool, str]] = Counter()

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        call = (context.is_recompute, str(op))
        seen[call] += 1
        keep = (str(op), seen[call] - 1) in saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _saved_calls(region: RegionGraph) -> frozenset[tuple[str, int]]:
    seen: Counter[str] = Counter()
    saved = set()
    for node in region.graph.nodes:
        if node.op == "call_function" and not is_mark(node):
            if node.name not in region.dropped and not is_view(node):
                saved.add((str(node.target), seen[str(node.target)]))
            seen[str(node.target)] += 1
    return frozenset(saved)


def recompile_text_only(module: fx.GraphModule) -> Any:
    """GraphModule.recompile without installing the generated forward: `.code` and `print_readable` show it."""
    code = module._graph.python_code(root_module="self")
    module._code = code.src
    module._lineno_map = code._lineno_map
    module._prologue_start = code._prologue_start
    return code


def adopt(owner: nn.Module, original: nn.Module) -> None:
    """Give `owner` the original's parameters, buffers and submodules: the same objects, by the same names."""
    owner._parameters = original._parameters
    owner._buffers = original._buffers
    owner._non_persistent_buffers_set = original._non_persistent_buffers_set
    for hooks in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        owner.__dict__[hooks] = original.__dict__[hooks]
    for name, child in original._modules.items():
        owner._modules[name] = child


def runnable(original: nn.Module, captured: Captured, outer: fx.Graph, regions: tuple[RegionGraph, ...]) -> fx.GraphModule:
    """The outer graph as a module over the flat tensor inputs: parameters are attributes, buffers are written back."""
    root = nn.Module()
    adopt(root, original)
    for region in regions:
        root._modules[region.name] = Region(region)
    own = {**captured.constants, "_own": original}
    root.__dict__.update(own)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(outer.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    by_input = sorted(
        (source.index, node) for node, source in zip(placeholders, captured.sources, strict=True) if source.kind == "input"
    )
    for _, node in by_input:
        copies[node] = graph.node_copy(node)
    for node, source in zip(placeholders, captured.sources, strict=True):
        if source.kind != "input":
            copies[node] = graph.get_attr(f"_own.{source.name}" if source.kind == "attribute" else source.name)
            copies[node].meta.update(node.meta)
    sources = {source: node for node, source in zip(placeholders, captured.sources, strict=True)}
    for node in nodes:
        if node.op == "output":
            results = [copies[n] for n in node.args[0]]
            for index, source in captured.mutations:
                graph.call_function(aten.copy_.default, (copies[sources[source]], results[index]))
            graph.output(tuple(results))
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    runnable = fx.GraphModule(root, graph, "Step")
    runnable._modules.pop("_own", None)  # fx's copy, for attributes that are read at each call
    adopt(runnable, original)
    runnable.__dict__.update(own)
    return runnable
