"""Door 2: `torch.compile(model, backend="remat", options={"budget": ...})`.

Dynamo hands over one graph at a time. AOTAutograd traces its joint graph, remat plans on it and partitions it, and the
halves go to Inductor (default) or run as plain FX graphs (`"compiler": "eager"`). Where the model has graph breaks, what the
earlier graphs keep for backward counts as resident for the later ones, and a graph that is known not to be the last takes
half of the room above its own smallest peak.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat.accumulation import with_room_for_gradients
from remat.compilation import Compilation
from remat.each_size import EachSize, changes_size
from remat.errors import CaptureError, RematError
from remat.passes.subgraphs import inline_regions
from remat.session import CompiledPlan, Options, Session

_sessions: dict[int, Session] = {}


def remat_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend `remat`. Options: `compiler` ("inductor", "eager"); `budget`, `policy`, `trainable_only`,
    `host_budget`, `pin`, `costs` as in `remat.optimize`, but that nothing moves to the host unless `host_budget`, a policy or a
    pin says so."""
    if mode is not None:
        raise _torch.past_dynamo(RematError("backend 'remat' takes options, not mode; write options={'budget': ...}"))
    try:
        return _compile(gm, example_inputs, options)
    except RematError as error:
        raise _torch.past_dynamo(error) from error.__cause__


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None) -> Callable[..., Any]:
    read = Options.read(options)
    if gm.graph.find_nodes(op="call_function", target=torch.autograd.grad):
        raise CaptureError(
            "backward is traced into the forward graph (torch._dynamo.config.trace_autograd_ops), where remat cannot split the "
            "two; turn that off, or compile the model without the call of backward()"
        )
    inline_regions(gm)
    session, frame, more_graphs = _session(options), _torch.frame_id(), _torch.has_graph_break(gm)

    def compile(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return Compilation(read, session, inputs, frame, more_graphs).run(gm)

    def compile_with_room(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return with_room_for_gradients(gm, inputs, read, session, compile)

    trains = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs)
    if trains and changes_size(example_inputs):
        return EachSize(gm, example_inputs, session, compile_with_room)
    return compile_with_room(gm, example_inputs) if trains else compile(gm, example_inputs)


def _session(options: Any) -> Session:
    call, model = _torch.compile_call(), _torch.outermost_module()
    key = id(call if call is not None else options)
    if key not in _sessions:
        made = Session(call, options, weakref.ref(model) if model is not None else None)
        for other in _sessions.values():
            if made.shares_with(other):
                made.beside.append(other)
                other.beside.append(made)
        _sessions[key] = made
    return _sessions[key]


def _reset() -> None:
    _sessions.clear()


remat_backend.reset = _reset  # type: ignore[attr-defined]


def plans(compiled: Any) -> list[CompiledPlan]:
    """The plans of a model compiled with backend "remat", one per graph, with the rewritten forward and backward graphs.

    Empty before its first call, and for a second model of the same class compiled with equal options: Dynamo runs the first
    one's code for it. Raises RematError for what was compiled otherwise, or not at all.
    """
    call = _torch.compile_call_of(compiled)
    if call is None or call.compiler_fn is not remat_backend:
        raise RematError('this was not compiled with torch.compile(..., backend="remat"); of other models remat.plan_of tells')
    session = _sessions.get(id(call))
    return list(session.graphs) if session is not None else []
