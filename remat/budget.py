"""Budgets: what a person writes, and the bytes it means.

`budget=` takes an int (bytes), "24GiB" / "24GB" (binary / decimal), "80%" of the device's memory, a float in (0, 1]
(that share of the unoptimized step's peak above what is resident), None (fastest plan) or "auto" (what the device has
free).
"""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass
from typing import TypeAlias

import torch

from remat.errors import BudgetError

log = logging.getLogger("remat")

BudgetLike: TypeAlias = "int | float | str | None"

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_FORMS = 'use bytes as an int, "24GiB", "24GB", "80%", a float in (0, 1], "auto" or None'


@dataclass(frozen=True)
class Budget:
    """A budget that has been read: at most one field is set, none means the fastest plan."""

    bytes: int | None = None
    share_of_device: float | None = None
    share_of_activations: float | None = None
    auto: bool = False


def parse_budget(budget: BudgetLike) -> Budget:
    """Read a budget in any of its forms. Raises BudgetError when it is none of them."""
    if budget is None:
        return Budget()
    if isinstance(budget, bool):
        raise BudgetError(f"budget={budget!r} is not an amount of memory; {_FORMS}")
    if isinstance(budget, int):
        return Budget(bytes=_positive(budget))
    if isinstance(budget, float):
        if math.isnan(budget) or not 0.0 < budget <= 1.0:
            raise BudgetError(f"budget={budget!r}: a float is a share of the step's activation memory in (0, 1]; {_FORMS}")
        return Budget(share_of_activations=budget)
    if isinstance(budget, str):
        return _parse_text(budget)
    raise BudgetError(f"budget={budget!r} has type {type(budget).__name__}; {_FORMS}")


def _parse_text(text: str) -> Budget:
    if text.strip().lower() == "auto":
        return Budget(auto=True)
    if match := _PERCENT.fullmatch(text):
        share = float(match[1]) / 100
        if not share > 0.0:
            raise BudgetError(f"budget={text!r} must be above 0%; {_FORMS}")
        return Budget(share_of_device=share)
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise BudgetError(f"budget={text!r} is not a size; {_FORMS}")
    return Budget(bytes=_positive(int(float(match[1]) * _UNITS[match[2].upper()])))


def _positive(amount: int) -> int:
    if amount <= 0:
        raise BudgetError(f"budget={amount} bytes must be above zero; {_FORMS}", budget_bytes=amount)
    return amount


@dataclass(frozen=True)
class Memory:
    """What a device has, in bytes, and what host memory values may wait in when nobody says how much."""

    name: str
    total_bytes: int
    free_bytes: int
    host_bytes: int


def memory_of(device: torch.device) -> Memory:
    """The memory of a device of this machine. Half of the host's free memory is for a GPU's values, and none for a CPU's."""
    host = free_bytes(torch.device("cpu")) // 2 if device.type not in ("cpu", "meta") else 0
    return Memory(str(device), device_bytes(device), free_bytes(device), host)


def resolve_budget(budget: Budget, memory: Memory, resident_bytes: int, baseline_peak_bytes: int) -> int | None:
    """The bytes a budget means for one step on a device; None when any peak is allowed."""
    if budget.bytes is not None:
        if budget.bytes > memory.total_bytes:
            total = format_bytes(memory.total_bytes)
            _say_once(f"the budget of {format_bytes(budget.bytes)} is larger than {memory.name} ({total})")
        return budget.bytes
    if budget.share_of_device is not None:
        return int(budget.share_of_device * memory.total_bytes)
    if budget.share_of_activations is not None:
        return resident_bytes + int(budget.share_of_activations * (baseline_peak_bytes - resident_bytes))
    if budget.auto:
        return memory.free_bytes + resident_bytes
    return None


def resolve_host_budget(host_budget: int | str | None, memory: Memory) -> int:
    """Bytes of host memory that values may lie in: given, a share of what is free ("50%"), or the default for the device.
    Raises BudgetError when it cannot be read."""
    if host_budget is None:
        return memory.host_bytes
    if isinstance(host_budget, int) and not isinstance(host_budget, bool) and host_budget == 0:
        return 0
    budget = parse_budget(host_budget)
    if budget.bytes is not None:
        return budget.bytes
    if budget.share_of_device is not None:
        return int(budget.share_of_device * free_bytes(torch.device("cpu")))
    raise BudgetError(f'host_budget={host_budget!r} is not an amount of host memory; use bytes as an int, "64GiB" or "50%"')


def device_bytes(device: torch.device) -> int:
    """All memory of the device, in bytes."""
    if device.type not in ("cpu", "meta"):
        return torch.accelerator.get_memory_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """Memory that the device has free now, in bytes; on a CPU what the system can give without swapping."""
    if device.type not in ("cpu", "meta"):
        free, _ = torch.accelerator.get_memory_info(device)
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def format_bytes(amount: int) -> str:
    """`6442450944` → `6.00 GiB`."""
    size = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning("%s", message)
