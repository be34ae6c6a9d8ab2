"""Where a step runs: the device, what it has, and what lies there before the step begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from remat.absent import LIBRARY_BYTES
from remat.budget import Memory, memory_of
from remat.devices import DeviceProfile, profile_of
from remat.op_times import OpTimes, op_times
from remat.resident import resident_memory, there_bytes
from remat.settings import Settings
from remat.workspace import library_bytes


@dataclass(frozen=True)
class Site:
    """`resident`: bytes by kind that lie on the device during all of a step, of which `there_bytes` are allocated already.
    `times`: what ops were measured to take there, where costs are measured."""

    device: torch.device
    profile: DeviceProfile
    resident: Mapping[str, int]
    there_bytes: int
    times: OpTimes | None

    @cached_property
    def memory(self) -> Memory:
        """What the device has; one that is not there is taken to be empty, on a host with as much again."""
        total = self.profile.memory_bytes
        if self.profile.is_here or not total:
            return memory_of(self.device, self.there_bytes)
        return Memory(self.profile.name, total, total, total, total)


def site_of(
    device: torch.device,
    settings: Settings,
    inputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    buffers: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    absent: DeviceProfile | None = None,
    real: Sequence[torch.Tensor] | None = None,
) -> Site:
    """The site of a step that reads these tensors. others: what else is there. absent: the device that `device` stands in for;
    real: the tensors that all of these stand in for."""
    profile = absent or profile_of(device)
    libraries = library_bytes(device) if profile.is_here else LIBRARY_BYTES if profile.is_gpu else 0
    resident = resident_memory(inputs, parameters, buffers, settings.optimizer, settings.in_flight > 1, others)
    there = libraries + there_bytes((*inputs, *parameters, *buffers) if real is None else real, settings.optimizer, device)
    times = op_times(device) if settings.costs == "measured" else None
    return Site(device, profile, {**resident, "libraries": libraries}, there, times)
