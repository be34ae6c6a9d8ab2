"""The plans of a model and the graphs that run them, whichever way remat came to it: `optimize`, `enable`, `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import fx, nn

from remat import _torch
from remat.backend import plans, remat_backend
from remat.errors import RematError
from remat.inplace import enabled
from remat.module import RematModule
from remat.plan import Plan


class Planned(NamedTuple):
    """A plan, and its graphs by name."""

    plan: Plan
    graphs: Mapping[str, fx.GraphModule]


def is_planned(model: Any) -> bool:
    """True for a model that trains by a plan, whether it has one yet or not."""
    call = _torch.compile_call_of(model)
    is_compiled = call is not None and call.compiler_fn is remat_backend
    return is_compiled or isinstance(model, RematModule) or (isinstance(model, nn.Module) and enabled(model) is not None)


def plans_of(model: Any) -> list[Planned]:
    """The plan of a model's latest kind of call; of a compiled one, those of all its graphs.

    Raises RematError for a model that has no plan yet, and for one that remat does not train.
    """
    found = plans_so_far(model)
    if not found:
        raise RematError("there is no plan yet; call the model once, or give optimize() example inputs")
    return found


def plans_so_far(model: Any) -> list[Planned]:
    """`plans_of`, none where there is no plan yet."""
    if not is_planned(model):
        raise RematError(
            f"there is no plan for this {type(model).__name__}: it is not from remat.optimize, nor under remat.enable, nor "
            'compiled with torch.compile(..., backend="remat")'
        )
    if isinstance(model, RematModule):
        return [] if model.plan is None else [Planned(model.plan, {"outer": model})]
    if isinstance(model, nn.Module) and (forward := enabled(model)) is not None:
        return [] if forward.plan is None else [Planned(forward.plan, forward.graphs)]
    return [Planned(each.plan, {"forward": each.forward, "backward": each.backward}) for each in plans(model)]


def only_plan(model: Any) -> Plan:
    """The plan of a model that has one. Raises RematError where `plans_of` does, and where there are several."""
    found = plans_of(model)
    if len(found) > 1:
        raise RematError(f"this model was compiled as {len(found)} graphs, each with a plan; remat.plans(model) has them")
    return found[0].plan
