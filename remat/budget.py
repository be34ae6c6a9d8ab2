"""Budgets: what a person writes, and the bytes it means.

`budget=` takes an int (bytes), "24GiB" / "24GB" (binary / decimal), "80%" of the device's memory, a float in (0, 1]
(that share of the unoptimized step's peak above what is resident), None (fastest plan) or "auto" (what the device has
free, with what of the step is there already). `host_budget=` takes bytes and percentages, of what the host has free.
"""

from __future__ import annotations

import logging
import math
import numbers
import re
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import torch

from remat import host_memory
from remat.errors import BudgetError

log = logging.getLogger("remat")

BudgetLike: TypeAlias = "int | float | str | None"

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_NO_MEMORY = 2**63  # bytes
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_FORMS = {
    "budget": 'use bytes as an int, "24GiB", "24GB", "80%", a float in (0, 1], "auto" or None',
    "host_budget": 'use bytes as an int, "64GiB", "64GB", "50%" of what the host has free, or None',
}


@dataclass(frozen=True)
class Budget:
    """A budget that has been read: at most one field is set, none means the fastest plan."""

    bytes: int | None = None
    share_of_device: float | None = None
    share_of_activations: float | None = None
    auto: bool = False


def parse_budget(budget: BudgetLike) -> Budget:
    """Read a budget in any of its forms. Raises BudgetError when it is none of them, or not above zero."""
    if budget is None:
        return Budget()
    if isinstance(budget, float):
        if math.isnan(budget) or not 0.0 < budget <= 1.0:
            _refuse("budget", budget, "is not a share of the step's activation memory in (0, 1]")
        return Budget(share_of_activations=budget)
    if isinstance(budget, str) and budget.strip().lower() == "auto":
        return Budget(auto=True)
    found = _read_amount("budget", budget)
    if not (found.bytes or found.share_of_device):
        _refuse("budget", budget, "must be above zero")
    return found


def parse_host_budget(host_budget: int | str | None) -> Budget:
    """Read an amount of host memory, which may be none: bytes, or a share of what the host has free. Raises BudgetError when it
    is neither."""
    return Budget() if host_budget is None else _read_amount("host_budget", host_budget)


def _read_amount(name: str, amount: object) -> Budget:
    """Bytes, or a percentage; `name` is the argument's."""
    if isinstance(amount, numbers.Integral) and not isinstance(amount, bool):
        if amount < 0:
            _refuse(name, amount, "is below zero")
        if int(amount) >= _NO_MEMORY:
            _refuse(name, amount, "is more than there is anywhere")
        return Budget(bytes=int(amount))
    if not isinstance(amount, str):
        _refuse(name, amount, f"is a {type(amount).__name__}, and no amount of memory")
    if match := _PERCENT.fullmatch(amount):
        share = float(match[1]) / 100
        if share > 1.0:
            _refuse(name, amount, "is more than all of it")
        return Budget(share_of_device=share)
    match = _SIZE.fullmatch(amount)
    if match is None or match[2].upper() not in _UNITS:
        _refuse(name, amount, "is not a size")
    found = float(match[1]) * _UNITS[match[2].upper()]
    if found >= _NO_MEMORY:
        _refuse(name, amount, "is more than there is anywhere")
    return Budget(bytes=int(found))


def _refuse(name: str, given: object, why: str) -> NoReturn:
    raise BudgetError(f"{name}={given!r} {why}; {_FORMS[name]}", budget_bytes=given if type(given) is int else None)


@dataclass(frozen=True)
class Memory:
    """What a device has, in bytes; what a step may take of it: all that is free, and what of it is there already; what host
    memory values may wait in when nobody says how much; and what of that is free."""

    name: str
    total_bytes: int
    usable_bytes: int
    host_bytes: int
    free_host_bytes: int


def memory_of(device: torch.device, there_bytes: int = 0) -> Memory:
    """The memory of a device of this machine, on which `there_bytes` of the step are allocated. Half of the host's free memory
    is for a GPU's values, and none for a CPU's."""
    free_host = host_memory.available_bytes()
    host = free_host // 2 if device.type not in ("cpu", "meta") else 0
    total = device_bytes(device)
    return Memory(str(device), total, min(total, free_bytes(device) + there_bytes), host, free_host)


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
        return memory.usable_bytes
    return None


def resolve_host_budget(host_budget: int | str | None, memory: Memory) -> int:
    """Bytes of host memory that values may lie in: given, a share of what is free ("50%"), or the default for the device.
    Raises BudgetError when it cannot be read."""
    budget = parse_host_budget(host_budget)
    if budget.share_of_device is not None:
        return int(budget.share_of_device * memory.free_host_bytes)
    return memory.host_bytes if budget.bytes is None else budget.bytes


def device_bytes(device: torch.device) -> int:
    """All memory of the device, in bytes."""
    if device.type not in ("cpu", "meta"):
        return torch.accelerator.get_memory_info(device)[1]
    return host_memory.total_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory that the device has free now, in bytes; on a CPU what the system can give without swapping."""
    if device.type not in ("cpu", "meta"):
        free, _ = torch.accelerator.get_memory_info(device)
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return host_memory.available_bytes()


def format_bytes(amount: int) -> str:
    """`6442450944` → `6.00 GiB`."""
    size, unit = _in_unit(amount)
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"


def format_needed(amount: int) -> str:
    """`709960` → `693.33 KiB (709960 bytes)`, rounded up: what is shown is enough as a budget."""
    size, unit = _in_unit(amount)
    return f"{math.ceil(100 * size) / 100:.2f} {unit} ({amount} bytes)"


def _in_unit(amount: int) -> tuple[float, str]:
    size = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return size, unit
        size /= 1024
    return size, "TiB"


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning("%s", message)
