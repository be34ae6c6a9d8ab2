"""What remat decided, as data: frozen, comparable, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from remat.errors import RematError
from remat.program import Decision
from remat.simulate import Moment

FORMAT = 1


@dataclass(frozen=True)
class Activation:
    """A forward value that backward reads, and what becomes of it.

    bytes: of its storage. cost_us: time to compute it once. reason: why this decision. module: path of the module that made
    it. source: file and line of the user's code.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    cost_us: float
    decision: Decision
    reason: str
    module: str
    source: str


@dataclass(frozen=True)
class Block:
    """A stretch of the forward graph between two narrow cuts. `region` names its checkpoint region, "" when it runs inline.

    shape: equal for blocks that are equal up to names.
    """

    name: str
    module: str
    region: str
    shape: str
    saved_bytes: int
    recompute_us: float
    activations: tuple[Activation, ...]


@dataclass(frozen=True)
class Transfer:
    """The way of an op's results to the host and back, by names of forward nodes.

    outputs: which results, counted without empty ones. release: the node after which their device memory is let go of. reload:
    the node the arrival of whose gradient starts the copy back, "" where the first reader does.
    """

    name: str
    outputs: tuple[int, ...]
    bytes: int
    release: str
    reload: str


@dataclass(frozen=True)
class Plan:
    """Decisions for one training step and what they are predicted to cost.

    Bytes are of the device and, for peaks, include `resident_bytes` (parameters, buffers, inputs, gradients and optimizer
    state found or given). `saved_bytes` is held on the device between forward and backward, `host_bytes` on the host. Times are
    of the cost model, in microseconds; `stall_us` is lost waiting for copies; `planning_seconds` counts from the end of
    tracing. `fingerprint` ties the plan to the graph it was made for.
    """

    budget_bytes: int | None
    peak_bytes: int
    baseline_peak_bytes: int
    resident_bytes: int
    saved_bytes: int
    host_bytes: int
    recompute_us: float
    stall_us: float
    step_us: float
    baseline_step_us: float
    planning_seconds: float
    blocks: tuple[Block, ...] = field(repr=False)
    timeline: tuple[Moment, ...] = field(repr=False)
    dropped: tuple[str, ...] = field(repr=False)
    regions: tuple[tuple[str, str], ...] = field(repr=False)
    transfers: tuple[Transfer, ...] = field(repr=False)
    device: str
    door: str
    fingerprint: str

    @cached_property
    def decisions(self) -> Mapping[str, Decision]:
        """The decision for each activation, by value name."""
        return {a.name: a.decision for block in self.blocks for a in block.activations}

    def summary(self) -> str:
        """The plan as a table, equal blocks merged."""
        from remat.report import summary

        return summary(self)

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"format": FORMAT, **fields}, default=dataclasses.asdict, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote. Raises RematError when it is not one."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != FORMAT:
                raise RematError(f"this plan has another format than {FORMAT}; plan again with this version of remat")
            data["blocks"] = tuple(_block(block) for block in data["blocks"])
            data["timeline"] = tuple(Moment(**moment) for moment in data["timeline"])
            data["dropped"] = tuple(data["dropped"])
            data["regions"] = tuple((start, stop) for start, stop in data["regions"])
            data["transfers"] = tuple(_transfer(transfer) for transfer in data["transfers"])
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RematError(f"this is not a plan that Plan.to_json wrote: {error}") from error

    def __str__(self) -> str:
        return self.summary()


def _block(data: dict[str, Any]) -> Block:
    activations = tuple(_activation(a) for a in data.pop("activations"))
    return Block(**data, activations=activations)


def _transfer(data: dict[str, Any]) -> Transfer:
    return Transfer(**{**data, "outputs": tuple(data["outputs"])})


def _activation(data: dict[str, Any]) -> Activation:
    return Activation(**{**data, "shape": tuple(data["shape"]), "decision": Decision(data["decision"])})
