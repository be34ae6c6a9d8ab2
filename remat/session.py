"""What the graphs of one compiled model share: the options they are compiled with, and the plans made so far."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from remat.budget import BudgetLike
from remat.errors import RematError
from remat.plan import Plan
from remat.settings import Common

log = logging.getLogger("remat")

COMPILERS = ("inductor", "eager")


@dataclass(frozen=True)
class Options(Common):
    """The backend's options. Without `host_budget` the planner moves nothing, and policies and pins what they like."""

    budget: BudgetLike = None
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compiler not in COMPILERS:
            raise RematError(f"compiler={self.compiler!r} is unknown; there are {', '.join(map(repr, COMPILERS))}")

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Options:
        known = tuple(option.name for option in dataclasses.fields(cls))
        for name in options or {}:
            if name not in known:
                raise RematError(f"unknown option {name!r} of backend 'remat'; there are {', '.join(map(repr, known))}")
        return cls(**dict(options or {}))


@dataclass
class CompiledPlan:
    """One graph of a compiled model: its plan, and the forward and backward graphs that run it. `peaks` are of every plan that
    was compiled for it, the last one's last: bytes as planned, and as the code allocates them."""

    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule
    frame: int
    peaks: tuple[tuple[int, int], ...]


@dataclass
class Session:
    """All graphs compiled with one options object, or by one `torch.compile` call without; they share the budget."""

    key: Any  # kept, so that its id stays its own
    graphs: list[CompiledPlan] = field(default_factory=list)
    said_broken: bool = False

    def say_broken(self) -> None:
        """Once: what no plan counts."""
        if not self.said_broken:
            log.warning(
                "the model has graph breaks: what runs between its graphs is not in the budget "
                "(torch.compile's fullgraph=True says where)"
            )
            self.said_broken = True

    def held_bytes(self, frame: int) -> int:
        """What the graphs that run before `frame` keep for backward."""
        latest = {graph.frame: graph for graph in self.graphs if graph.frame < frame}
        return sum(graph.plan.saved_bytes for graph in latest.values())
