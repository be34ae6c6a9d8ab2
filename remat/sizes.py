"""One call of a model, whose step is recorded at other sizes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from remat.settings import Settings
from remat.shapes import Axes, resized, size_of
from remat.whole import TracedModel, trace


@dataclass(frozen=True)
class SizedCall:
    """A call of a model, the axes of its inputs that may change size, by name, and how its step is to be planned."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: Axes
    settings: Settings
    device: str | None

    def size_of(self, dim: str) -> int:
        """How long the axes called `dim` are in the inputs given."""
        return size_of(self.args, self.kwargs, self.axes, dim)

    def traced(self, sizes: Mapping[str, int]) -> TracedModel:
        """The step with the axes of these names as long as that."""
        args, kwargs = resized(self.args, self.kwargs, self.axes, sizes)
        return trace(self.model, args, kwargs, self.settings, self.device)
