"""What `remat plan tests.cli_models:NAME` is called with in tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

no_function = 3


def mlp(batch: int = 4, width: int = 64) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(6))), torch.zeros(batch, width)


def several(batch: int = 4) -> tuple[nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    return nn.Bilinear(8, 8, 2), (torch.zeros(batch, 8),), {"input2": torch.zeros(batch, 8)}


def fails() -> Any:
    raise KeyError("no such thing")


def returns_nothing() -> None:
    return None
