"""What the benchmarks and tests on an accelerator share: a stack of Llama blocks in plain torch, timing, and where it ran.

Needs torch and remat only.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

RESULTS = Path(__file__).parent / "results"


class Attention(nn.Module):
    """Causal self-attention with rotary positions; heads of 128."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = max(width // 128, 1), dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(split[0], rotation), rotate(split[1], rotation)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, split[2], is_causal=True, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding; `rotation` is (cos, sin) of shape [2, length, head]."""
    a, b = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat((-b, a), dim=-1) * rotation[1]


class Block(nn.Module):
    """A Llama block: attention and a gated MLP of 8/3 of the width, each after an RMS norm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-width * 8 // 3) // -256 * -256
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, dropout)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), rotation))
        y = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(y)) * self.up(y)))


class Stack(nn.Module):
    """Identical blocks and a loss. `checkpointed` runs each block under `torch.utils.checkpoint`."""

    rotation: torch.Tensor

    def __init__(self, width: int, depth: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.checkpointed = False
        half = min(width, 128) // 2
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(half) / half)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, self.rotation, use_reentrant=False) if self.checkpointed else layer(x, self.rotation)
        return self.norm(x).float().square().mean()


def stack(
    width: int, depth: int, length: int, *, dropout: float = 0.0, device: Any = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Stack, torch.Tensor]:
    """A stack in training mode with its gradients allocated, and an input [1, length, width]."""
    torch.manual_seed(0)
    place = device or accelerator()
    with torch.device(place):
        model = Stack(width, depth, length, dropout).to(dtype).train()
        x = torch.randn(1, length, width, dtype=dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, x


def accelerator() -> torch.device | None:
    """The accelerator of this machine."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(found.type, torch.accelerator.current_device_index()) if found is not None else None


def need_accelerator() -> torch.device:
    """The accelerator, or the end of the script with the reason."""
    found = accelerator()
    if found is None:
        print("not run: there is no accelerator on this machine")
        sys.exit(0)
    return found


def step_of(model: Callable[..., torch.Tensor], x: torch.Tensor, owner: nn.Module) -> Callable[[], None]:
    """One forward and backward; gradients are added up where they lie."""

    def step() -> None:
        model(x).backward()

    for parameter in owner.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    return step


def timed(steps: Mapping[str, Callable[[], None]], rounds: int = 8) -> dict[str, tuple[float, int]]:
    """Median milliseconds of a step and its peak in bytes above what was there before, in turn; two steps to warm up."""
    device = need_accelerator()
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for turn in range(rounds + 2):
        for name, step in steps.items():
            torch.accelerator.synchronize(device)
            resident = torch.accelerator.memory_allocated(device)
            torch.accelerator.reset_peak_memory_stats(device)
            start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.accelerator.synchronize(device)
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
                peaks[name] = max(peaks[name], torch.accelerator.max_memory_allocated(device) - resident)
    return {name: (statistics.median(times[name]), peaks[name]) for name in steps}


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, and keep them with device, driver and versions."""
    where = environment()
    print(f"\n{where['device']}, driver {where['driver']}, torch {where['torch']}, python {where['python']}")
    columns = list(rows[0])
    lines = [columns, *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, "rows": list(rows)}, indent=1) + "\n")


def _text(cell: Any) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def environment() -> dict[str, str]:
    """Device, driver and versions."""
    device = need_accelerator()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"device": name, "driver": driver, "torch": torch.__version__, "python": platform.python_version()}
