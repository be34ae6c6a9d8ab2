"""What the graphs of a compiled model share: the options they are compiled with, and the plans made so far."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from remat import _torch
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
                raise RematError(
                    f"unknown option {name!r} of backend 'remat'; there are {', '.join(map(repr, known))}; those of Inductor "
                    "(max_autotune and others) are set in torch._inductor.config"
                )
        return cls(**dict(options or {}))


@dataclass
class CompiledPlan:
    """One graph of a compiled model: its plan, and the forward and backward graphs that run it. `peaks` are of every plan that
    was compiled for it, the last one's last: bytes as planned, and as the code allocates them. `unsaved_bytes`: what more it
    would save under a larger budget. `read`: of what it was given when it was compiled, but for parameters, all that no other
    graph keeps, and its bytes."""

    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule
    frame: int
    peaks: tuple[tuple[int, int], ...]
    unsaved_bytes: int
    read: tuple[tuple[_torch.StorageWeakRef, int], ...] = field(default=(), repr=False)


@dataclass
class Session:
    """The graphs that one `torch.compile` call led to. They share its budget, also with those of other calls with the same
    options object in the same model: its blocks, say, compiled one by one."""

    call: Any  # kept, so that its id stays its own
    options: Any
    model: weakref.ref[Any] | None
    graphs: list[CompiledPlan] = field(default_factory=list)
    beside: list[Session] = field(default_factory=list)
    said_broken: bool = False

    def shares_with(self, other: Session) -> bool:
        """Whether the two are for parts of one model."""
        if self.options is None or self.options is not other.options or self.model is None or other.model is None:
            return False
        return self.model() is not None and self.model() is other.model()

    def say_broken(self) -> None:
        """Once: what no plan counts."""
        if not self.said_broken:
            log.warning(
                "the model has graph breaks, or inputs with a gradient: what runs outside of its graphs is not in the budget "
                "(torch.compile's fullgraph=True says where)"
            )
            self.said_broken = True

    def others(self, frame: int) -> list[CompiledPlan]:
        """The other graphs that share the budget, the latest of each Dynamo frame."""
        graphs = [graph for session in (*self.beside, self) for graph in session.graphs]
        return list({graph.frame: graph for graph in graphs if graph.frame != frame}.values())

    def held_bytes(self, frame: int, inputs: Sequence[torch.Tensor]) -> int:
        """What the graphs that run before `frame` keep for backward, or have read and is still there, but for its inputs."""
        earlier = [graph for graph in self.others(frame) if graph.frame < frame]
        read = {ref.cdata: size for graph in earlier for ref, size in graph.read if not ref.expired()}
        for tensor in inputs:
            read.pop(_torch.storage_key(tensor), None)
        return sum(graph.plan.saved_bytes for graph in earlier) + sum(read.values())


def read_by(inputs: Sequence[torch.Tensor]) -> tuple[tuple[_torch.StorageWeakRef, int], ...]:
    """`CompiledPlan.read` of a graph with these inputs."""
    tensors = (t for t in inputs if not isinstance(t, torch.nn.Parameter) and _torch.is_kept_by_no_graph(t))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return tuple((_torch.StorageWeakRef(storage), storage.nbytes()) for storage in storages)
