"""Compiled steps whose inputs change size: a plan and code for each size, made when that comes.

Dynamo hands over one graph for all sizes, with symbols for them. A plan is of bytes, and code by it of one size. So the graph
is compiled for the sizes of each call, and Dynamo, which runs a model without us after a few recompilations, makes no other.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat.session import CompiledPlan, Session
from remat.state import OFTEN

log = logging.getLogger("remat")

KEPT = 256  # of one graph: compiling again takes longer than what is kept takes memory
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul, "mul", "add")


def changes_size(inputs: Sequence[Any]) -> bool:
    """Whether Dynamo's example inputs have symbols among them, for sizes of the others."""
    return any(isinstance(value, torch.SymInt) for value in inputs)


class EachSize:
    """A graph of Dynamo's with its example inputs, compiled by `compile` for the values that its symbols have in a call; those
    called last are kept. Symbols are sizes, and numbers in whose place Dynamo passes tensors, a module's attributes among them.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        session: Session,
        compile: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    ) -> None:
        self._gm, self._session, self._compile = gm, session, compile
        nodes = gm.graph.find_nodes(op="placeholder")
        self._sizes = [i for i, value in enumerate(inputs) if isinstance(value, torch.SymInt)]
        self._numbers = [i for i, node in enumerate(nodes) if any(_is_number(user) for user in node.users)]
        self._lock = threading.RLock()
        self._made: dict[tuple[Any, ...], tuple[Callable[..., Any], list[CompiledPlan]]] = {}

    def __call__(self, *args: Any) -> Any:
        values = (*(args[i] for i in self._sizes), *(args[i].item() for i in self._numbers))
        tensors = [arg for i, arg in enumerate(args) if i not in self._sizes]
        with self._lock:
            made = self._made.pop(values, None) or self._make(values, tensors)
            self._made[values] = made
        return made[0](*tensors)

    def _make(self, values: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Callable[..., Any], list[CompiledPlan]]:
        before = len(self._session.graphs)
        with _torch.outside_dynamo():
            code = self._compile(self._at(values), tensors)
        made = code, self._session.graphs[before:]
        if len(self._made) + 1 == OFTEN:
            log.warning("%d sizes of inputs have been planned and compiled, which takes time; pad to a few lengths", OFTEN)
        if len(self._made) + 1 > KEPT:
            _, plans = self._made.pop(next(iter(self._made)))
            gone = set(map(id, plans))
            self._session.graphs = [graph for graph in self._session.graphs if id(graph) not in gone]
        return made

    def _at(self, values: tuple[Any, ...]) -> fx.GraphModule:
        """The graph with these values for its symbols. Sizes are no inputs of it any more."""
        known = dict(zip((*self._sizes, *self._numbers), values, strict=True))
        graph, copies = fx.Graph(), {}
        inputs = {node: i for i, node in enumerate(self._gm.graph.find_nodes(op="placeholder"))}
        for node in self._gm.graph.nodes:
            if inputs.get(node) in self._sizes:
                copies[node] = known[inputs[node]]
            elif _is_number(node):
                copies[node] = known[inputs[node.args[0]]]
            elif _is_known(node):
                copies[node] = graph.call_method("to", (copies[node.args[0]], torch.float32))
            else:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        found = fx.GraphModule(self._gm, graph)
        found.meta.update(self._gm.meta)
        return found


def _is_known(node: fx.Node) -> bool:
    """True for the number in a tensor that Dynamo passes in its place, which is no data."""
    value = node.meta.get("example_value")
    return node.target == "item" and isinstance(value, torch.SymFloat) and not _torch.free_unbacked_symbols(value)


def _is_number(node: fx.Node) -> bool:
    """True for such a number where it has to be one; in arithmetic a tensor does as well, and may change from call to call."""
    return _is_known(node) and not all(user.target in _ARITHMETIC and _takes_tensor(user) for user in node.users)


def _takes_tensor(node: fx.Node) -> bool:
    """Whether arithmetic of a tensor and a number gives the same bits with that as a tensor in float32."""
    found = [arg.meta.get("example_value") for arg in node.all_input_nodes]
    tensors = [value for value in found if isinstance(value, torch.Tensor)]
    if node.target is operator.truediv and not isinstance(found[0], torch.Tensor):
        return False  # the number times the tensor's reciprocal
    return any(t.dtype is torch.float32 or (t.dim() > 0 and t.is_floating_point() and t.dtype.itemsize < 4) for t in tensors)
