"""A region's graph as steps over numbered slots: what the runtime runs in forward and again in backward."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from remat._torch import pytree
from remat.passes.aliasing import results
from remat.passes.randomness import may_draw
from remat.passes.transfers import is_mark, read_transfers

aten = torch.ops.aten

_N_REMADE = 3  # of batch norm's results: all but its new running statistics


@dataclass(frozen=True)
class Step:
    """One node of a region. `slots` are the environment slots of its tensor inputs, in the order that `call` takes them;
    `random` is the device whose generator it draws from. `repeats` is how often backward lets go of its results before
    their last reader. Of several results `again` gives the first `remade` (None: all).

    After it the device memory of the offloaded nodes in `releases` is let go of; when the gradient of its result is there, the
    copies back of those in `reloads` start.
    """

    name: str
    call: Callable[..., Any]
    again: Callable[..., Any]
    slots: tuple[int, ...]
    again_slots: tuple[int, ...]
    out: int
    dropped: bool
    random: torch.device | None
    repeats: int = 0
    item: int | None = None
    dead: tuple[int, ...] = ()
    offloaded: tuple[int, ...] = ()
    releases: tuple[str, ...] = ()
    reloads: tuple[str, ...] = ()
    remade: int | None = None

    @cached_property
    def is_plain(self) -> bool:
        """True for an op whose results are neither computed again nor moved."""
        return not (self.dropped or self.repeats or self.offloaded or self.reloads)


@dataclass(frozen=True)
class RegionProgram:
    """A region's nodes as steps over numbered slots; the first `n_inputs` slots are the region's inputs."""

    steps: tuple[Step, ...]
    n_inputs: int
    n_slots: int
    outputs: tuple[int, ...]

    @cached_property
    def has_repeats(self) -> bool:
        return any(step.repeats for step in self.steps)


def compile_region(graph: fx.Graph, dropped: frozenset[str], repeats: Mapping[str, int]) -> RegionProgram:
    """Turn a region's graph into steps. `dropped` names the nodes whose results are recomputed (views of them included, but for
    those of nodes in `repeats`), `repeats` says how often results are let go of before their last reader."""
    slots = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    n_inputs = len(slots)
    nodes = [node for node in graph.nodes if node.op == "call_function" and not is_mark(node)]
    transfers = read_transfers(graph)
    for node in nodes:
        slots[node] = len(slots)
    outputs = tuple(slots[node] for node in results(graph))
    last = {source: node for node in nodes for source in node.all_input_nodes}
    steps = []
    for node in nodes:
        dead = tuple(
            slots[s]
            for s in dict.fromkeys([*node.all_input_nodes, node])
            if last.get(s, node) is node and slots[s] not in outputs
        )
        call, order = bind(node)
        again, again_order = _bind_again(node)
        steps.append(
            Step(
                name=node.name,
                call=call,
                again=again,
                slots=tuple(slots[s] for s in order),
                again_slots=tuple(slots[s] for s in again_order),
                out=slots[node],
                dropped=node.name in dropped and not _is_statistic(node),
                random=_device_of(node) if may_draw(node) else None,
                repeats=repeats.get(node.name, 0),
                item=node.args[1] if node.target is operator.getitem else None,
                dead=dead,
                offloaded=transfers.offloaded.get(node.name, ()),
                releases=transfers.releases.get(node.name, ()),
                reloads=transfers.reloads.get(node.name, ()),
                remade=_N_REMADE if _is_batch_norm(node) else None,
            )
        )
    return RegionProgram(tuple(steps), n_inputs, len(slots), outputs)


def _device_of(node: fx.Node) -> torch.device:
    leaves = pytree.tree_leaves(node.meta["val"])
    return next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))


def recompute_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that recomputing `node` reads."""
    if _is_batch_norm(node):
        return tuple(a for a in node.args[:3] if isinstance(a, fx.Node))
    return tuple(node.all_input_nodes)


def made_again(node: fx.Node, result: Any) -> Any:
    """What of the result of `node` recomputing it gives: of batch norm all but the new running statistics."""
    return result[:_N_REMADE] if _is_batch_norm(node) else result


def _is_statistic(node: fx.Node) -> bool:
    """Whether a node picks a new running statistic."""
    if node.target is not operator.getitem:
        return False
    call, index = node.args
    return isinstance(call, fx.Node) and _is_batch_norm(call) and isinstance(index, int) and index >= _N_REMADE


def _is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is batch norm that takes its statistics from the batch."""
    return node.target is aten._native_batch_norm_legit_functional.default and node.args[5] is True


def _bind_again(node: fx.Node) -> tuple[Callable[..., Any], tuple[fx.Node, ...]]:
    """The call that recomputes a node: its own, but batch norm without the running statistics it has updated by then, and
    recurrent layers with grad on, without which their kernel does not return what backward reads."""
    if node.target is aten.mkldnn_rnn_layer.default:
        own, order = bind(node)
        return functools.partial(_with_grad, own), order
    if not _is_batch_norm(node):
        return bind(node)
    momentum, eps = node.args[6:8]
    is_given = [isinstance(argument, fx.Node) for argument in node.args[:3]]

    def call(*values: Any) -> Any:
        given = iter(values)
        x, weight, bias = (next(given) if there else None for there in is_given)
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)

    return call, recompute_inputs(node)


def _with_grad(call: Callable[..., Any], *values: torch.Tensor) -> Any:
    with torch.enable_grad():
        return call(*(value.detach() for value in values))


def bind(node: fx.Node) -> tuple[Callable[..., Any], tuple[fx.Node, ...]]:
    """A callable that takes the node's tensor inputs in order and runs the node's op with its other arguments; compiled from
    source, so that a call puts no arguments together."""
    order: list[fx.Node] = []
    names: dict[str, Any] = {"target": node.target}

    def written(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            order.append(argument)
            return f"v{len(order)}"
        if isinstance(argument, tuple | list):
            inside = "".join(f"{written(a)}, " for a in argument)
            return f"({inside})" if isinstance(argument, tuple) else f"[{inside}]"
        names[f"c{len(names)}"] = argument
        return f"c{len(names) - 1}"

    arguments = [*map(written, node.args), *(f"**{{{name!r}: {written(a)}}}" for name, a in node.kwargs.items())]
    parameters = ", ".join(f"v{i + 1}" for i in range(len(order)))
    return eval(f"lambda {parameters}: target({', '.join(arguments)})", names), tuple(order)
