"""Put a plan's transfers into a graph as nodes, where `print_readable` shows them, and read them back.

`offload(value, outputs)` stands after the node whose result is copied out; `release(names)` where the device memory of these
nodes' results is let go of; `reload(value, names)` after a node the arrival of whose gradient starts the copies back. The
runtime acts on them (runtime.py); run as plain functions they do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Transfers:
    """What moves to the host and back, by names of nodes.

    offloaded: which of a node's results are copied out, counted without empty ones. releases: the offloaded nodes whose device
    memory is let go of after a node. reloads: those whose copies back start when the gradient of a node's result is there.
    """

    offloaded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    releases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reloads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def offload(value: Any, outputs: tuple[int, ...]) -> None:
    """Copy these results of an op to the host, in forward."""


def release(names: tuple[str, ...]) -> None:
    """Let go of the device memory of the results of these nodes, in forward, when their copies are done."""


def reload(value: Any, names: tuple[str, ...]) -> None:
    """Copy the results of these nodes back, in backward, from when the gradient of `value` is there."""


_MARKS = (offload, release, reload)


def is_mark(node: fx.Node) -> bool:
    """True for the nodes that `insert_transfers` adds."""
    return node.target in _MARKS


def insert_transfers(graph: fx.Graph, transfers: Transfers) -> None:
    """Add the transfers that concern this graph's nodes, in place."""
    for node in list(graph.nodes):
        marks: list[tuple[Any, tuple[Any, ...]]] = []
        if node.name in transfers.offloaded:
            marks.append((offload, (node, transfers.offloaded[node.name])))
        if node.name in transfers.reloads:
            marks.append((reload, (node, transfers.reloads[node.name])))
        if node.name in transfers.releases:
            marks.append((release, (transfers.releases[node.name],)))
        with graph.inserting_before(node.next):
            for target, args in marks:
                graph.call_function(target, args)


def read_transfers(graph: fx.Graph) -> Transfers:
    """The transfers that a graph's nodes say."""
    offloaded: dict[str, tuple[int, ...]] = {}
    releases: dict[str, tuple[str, ...]] = {}
    reloads: dict[str, tuple[str, ...]] = {}
    last = ""
    for node in graph.nodes:
        if not is_mark(node):
            last = node.name
        elif node.target is offload:
            offloaded[last] = node.args[1]
        elif node.target is release:
            releases[last] = node.args[0]
        else:
            reloads[last] = node.args[1]
    return Transfers(offloaded, releases, reloads)


def without_transfers(graph: fx.Graph) -> fx.Graph:
    """A copy without them."""
    plain = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if not is_mark(node):
            copies[node] = plain.node_copy(node, lambda n: copies[n])
    return plain
