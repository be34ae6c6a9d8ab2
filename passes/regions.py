"""Rewrite a forward graph: each stretch that recomputes something becomes one call of a checkpoint region.

Source: the regions of `torch.utils.checkpoint` (Chen et al. 2016), cut where the planner cut.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from remat.passes.transfers import Transfers, insert_transfers


@dataclass(frozen=True)
class Stretch:
    """Consecutive forward nodes by name, those among them whose results are dropped, and how often the results of some are let
    go of before their last reader (`remat.schedule`)."""

    nodes: tuple[str, ...]
    dropped: frozenset[str]
    repeats: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RegionGraph:
    """A region on its own: `graph` takes `inputs` (names in the outer graph) and returns `outputs`."""

    name: str
    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dropped: frozenset[str]
    repeats: Mapping[str, int]


def form_regions(
    graph: fx.Graph, stretches: Sequence[Stretch], transfers: Transfers | None = None
) -> tuple[fx.Graph, tuple[RegionGraph, ...]]:
    """The outer graph, calling `region_0`, `region_1`, …, and the regions. The given graph is left as it is.

    Every node of both carries its decision in `meta["recompute"]`, where `print_readable` and tlparse look.
    """
    home = {name: i for i, stretch in enumerate(stretches) for name in stretch.nodes}
    outer = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    regions: list[RegionGraph] = []
    nodes = list(graph.nodes)
    for node in nodes:
        index = home.get(node.name)
        if index is None:
            copies[node] = outer.node_copy(node, lambda n: copies[n])
            continue
        if node.name != stretches[index].nodes[0]:
            continue
        members = [n for n in nodes if home.get(n.name) == index]
        region = _cut_out(f"region_{index}", members, stretches[index], transfers or Transfers())
        regions.append(region)
        call = outer.call_module(region.name, tuple(copies[n] for n in _inputs(members)))
        call.meta.update({k: v for k, v in members[0].meta.items() if k in ("nn_module_stack", "stack_trace")})
        for i, output in enumerate(_outputs(members)):
            copies[output] = outer.call_function(operator.getitem, (call, i), name=output.name)
            copies[output].meta.update(output.meta)
    outer.lint()
    return outer, tuple(regions)


def _cut_out(name: str, members: list[fx.Node], stretch: Stretch, transfers: Transfers) -> RegionGraph:
    inner = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs, outputs = _inputs(members), _outputs(members)
    for node in inputs:
        copies[node] = inner.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in members:
        copies[node] = inner.node_copy(node, lambda n: copies[n])
        copies[node].meta["recompute"] = decision_policy(node.name in stretch.dropped)
    inner.output(tuple(copies[node] for node in outputs))
    insert_transfers(inner, transfers)
    inner.lint()
    return RegionGraph(
        name,
        inner,
        tuple(n.name for n in inputs),
        tuple(n.name for n in outputs),
        frozenset(copies[n].name for n in members if n.name in stretch.dropped),
        {copies[n].name: stretch.repeats[n.name] for n in members if n.name in stretch.repeats},
    )


def decision_policy(dropped: bool) -> CheckpointPolicy:
    """The decision in the words of `torch.utils.checkpoint`."""
    return CheckpointPolicy.MUST_RECOMPUTE if dropped else CheckpointPolicy.MUST_SAVE


def _inputs(members: list[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    return list(dict.fromkeys(s for node in members for s in node.all_input_nodes if s not in inside))


def _outputs(members: list[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    return [node for node in members if any(user not in inside for user in node.users)]
