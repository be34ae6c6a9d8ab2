"""Compiled steps that add to gradients: planned again where gradients are there that the plan has no room for.

Dynamo compiles a model in its first step, when no gradients are there yet, and does not look at them. A step that accumulates
has them beside all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from remat import _torch
from remat.budget import parse_budget
from remat.errors import telling_of_gradients
from remat.session import Options, Session

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def with_room_for_gradients(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, session: Session, compile: Compile
) -> Callable[..., Any]:
    """What `compile` makes of a graph of Dynamo's; and where gradients are there beside which that would not stay within a
    budget in bytes, what it makes of it then."""
    before = len(session.graphs)
    code = compile(gm, inputs)
    if len(session.graphs) == before or options.policy != "auto" or parse_budget(options.budget).share_of_activations:
        return code
    plan = session.graphs[-1].plan
    if plan.budget_bytes is None:
        return code
    missing = [i for i, t in enumerate(inputs) if isinstance(t, nn.Parameter) and t.requires_grad and t.grad is None]
    if plan.peak_bytes + sum(inputs[i].untyped_storage().nbytes() for i in missing) <= plan.budget_bytes:
        return code
    return _Accumulating(code, gm, missing, compile)


@dataclass
class _Accumulating:
    """`first` is for steps in which none of the `parameters`, by their places among the arguments, has a gradient."""

    first: Callable[..., Any]
    gm: fx.GraphModule
    parameters: list[int]
    compile: Compile
    again: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if all(args[i].grad is None for i in self.parameters):
            return self.first(*args)
        if self.again is None:
            with telling_of_gradients(True), _torch.outside_dynamo():
                self.again = self.compile(self.gm, args)
        return self.again(*args)
