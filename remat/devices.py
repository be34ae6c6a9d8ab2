"""What devices can do: rates that costs are computed with, and the memory there is.

Arithmetic and memory rates of the well-known GPUs are those of the makers' data sheets: dense, without sparsity, with
accumulation in float32. Their memory is about what drivers report. How much of a rate a step reaches (`_REACHED`) and what
pinned copies do (25 GB/s over PCIe 4 x16, 55 GB/s over PCIe 5) are assumptions; `profile_device` measures both.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from remat.errors import RematError
from remat.program import Link

log = logging.getLogger("remat")

_REACHED = 0.75


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of a device, per microsecond: arithmetic in 16 bit and in float32, memory traffic, the way to the host; a fixed
    cost per kernel; a cost per element of random draws in PyTorch's kernels and Inductor's, and of transcendental functions;
    the memory it has. `is_here` is False for a device that is planned for from afar.
    """

    name: str
    half_flop_per_us: float
    float_flop_per_us: float
    bytes_per_us: float
    launch_us: float
    recompute_launch_us: float
    random_ns_per_element: float
    fused_random_ns_per_element: float
    transcendental_ns_per_element: float
    link: Link
    memory_bytes: int = 0
    is_here: bool = True

    @property
    def is_gpu(self) -> bool:
        return not self.name.startswith("cpu")

    def slack_bytes(self, largest: int) -> int:
        """Allowed for what is in no graph: Python numbers that kernels wrap into tensors, a few bytes each; on a GPU also what
        free blocks are larger than the tensors they are used for, up to 1 MiB each where tensors take more than that.

        largest: bytes of the largest tensor of the step."""
        blocks = min(largest, 8 * 2**20) if self.is_gpu and largest > 2**20 else 0
        return 4096 + blocks

    def allocated_bytes(self, size: int) -> int:
        """What the device's allocator takes for a tensor of `size` bytes."""
        return cuda_block_bytes(size) if self.is_gpu else size

    def flop_per_us(self, dtype: torch.dtype) -> float:
        """Arithmetic rate of matrix products in a dtype."""
        return self.half_flop_per_us if dtype.itemsize <= 2 else self.float_flop_per_us


def cuda_block_bytes(size: int) -> int:
    """What torch's CUDA allocator counts for a tensor of `size` bytes: steps of 512 bytes, and from 10 MiB on whole blocks of
    2 MiB where at most 1 MiB of the last one would be left over (`CUDACachingAllocator`, `should_split`)."""
    size += -size % 512
    rest = -size % 2**21
    return size + rest if size >= 10 * 2**20 and rest <= 2**20 else size


CPU = DeviceProfile("cpu", 120e3, 120e3, 12e3, 3.0, 3.0, 3.0, 11.0, 0.6, Link(6e3, 6e3, overlaps=False, start_us=3.0))
CUDA = DeviceProfile("cuda", 400e6, 40e6, 2.5e6, 4.0, 6.0, 0.0, 0.0, 0.0, Link(20e3, 20e3, overlaps=True, start_us=10.0))


def _gpu(
    name: str, half_tflops: float, float_tflops: float, gb_per_s: float, link_gb_per_s: float, memory_gib: float
) -> DeviceProfile:
    link = Link(link_gb_per_s * 1e3, link_gb_per_s * 1e3, overlaps=True, start_us=10.0)
    return DeviceProfile(
        name,
        half_tflops * 1e6 * _REACHED,
        float_tflops * 1e6 * _REACHED,
        gb_per_s * 1e3 * _REACHED,
        4.0,
        6.0,
        0.0,
        0.0,
        0.0,
        link,
        int(memory_gib * 2**30),
        is_here=False,
    )


DEVICES = {
    profile.name: profile
    for profile in (
        _gpu("a100-40gb", 312, 19.5, 1555, 25, 39.4),
        _gpu("a100-80gb", 312, 19.5, 2039, 25, 79.2),
        _gpu("h100", 989, 67, 3350, 55, 79.2),
        _gpu("h200", 989, 67, 4800, 55, 139.8),
        _gpu("l4", 121, 30.3, 300, 25, 22.0),
        _gpu("rtx3090", 71, 35.6, 936, 25, 23.6),
        _gpu("rtx4090", 165, 82.6, 1008, 25, 23.6),
        _gpu("rtx5090", 209.5, 104.8, 1792, 55, 31.4),
        dataclasses.replace(CPU, is_here=False),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """A well-known device by name; with the figures that `profile_device` measured, if this machine has one. Raises RematError
    with the names there are."""
    found = DEVICES.get(name.lower().replace(" ", "")) if isinstance(name, str) else None
    if found is None:
        raise RematError(f"device={name!r} is unknown; there are {', '.join(DEVICES)}")
    for device in {torch.device("cpu"), _accelerator()}:
        measured = _read(cache_file(device))
        if measured is not None and measured.name == found.name:
            return dataclasses.replace(measured, is_here=False)
    return found


def profile_of(device: torch.device) -> DeviceProfile:
    """The profile that costs on a device of this machine are computed with: measured, if `profile_device` did; else known by
    its name; else a typical one."""
    return _read(cache_file(device)) or _assumed(device)


def _assumed(device: torch.device) -> DeviceProfile:
    """What is known of a device without measuring it."""
    if device.type in ("cpu", "meta"):
        return CPU
    return _known_gpu(_full_name(device)) or CUDA


def _accelerator() -> torch.device:
    """The current one, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _known_gpu(full_name: str) -> DeviceProfile | None:
    words = full_name.lower().replace("rtx ", "rtx")
    for name, profile in DEVICES.items():
        if all(re.search(rf"\b{part}\b", words) for part in name.split("-")):
            return dataclasses.replace(profile, is_here=True)
    return None


def profile_device(device: torch.device | str | None = None, *, again: bool = False) -> DeviceProfile:
    """Measure a device of this machine in a few seconds; plans on it use the figures from then on, in later processes too.

    device: by default the current accelerator, or the CPU where there is none. again: measure even if there are figures.
    Raises RematError for a device that is neither.
    """
    here = _accelerator()
    chosen = torch.device(device if device is not None else here)
    if chosen.type not in ("cpu", here.type):
        raise RematError(f"device={chosen} cannot be measured; there are 'cpu' and {here.type!r}")
    path = cache_file(chosen)
    known = None if again else _read(path)
    if known is not None:
        return known
    profile = _measure(chosen)
    write_figures(path, dataclasses.asdict(profile))
    _read.cache_clear()
    return profile


def write_figures(path: Path, figures: Mapping[str, Any]) -> bool:
    """Keep measured figures for later processes, all of them or none; whether that was possible."""
    text = json.dumps(figures, indent=0, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("measured figures cannot be kept: %s", error)
        return False
    return True


def cache_file(device: torch.device, what: str = "") -> Path:
    """Where figures measured on a device are kept; `what` tells kinds of figures apart."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remat"
    model = f"cpu-{torch.get_num_threads()}" if device.type in ("cpu", "meta") else _full_name(device).replace(" ", "-")
    return folder / f"{model}-torch-{torch.__version__}{what and f'-{what}'}.json"


def _full_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


@cache
def _read(path: Path) -> DeviceProfile | None:
    try:
        data = json.loads(path.read_text())
        return DeviceProfile(**{**data, "link": Link(*data["link"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # never measured, or by another version: measure again


def _measure(device: torch.device) -> DeviceProfile:
    on_gpu = device.type != "cpu"
    base = _assumed(device)
    side, size = (8192, 1 << 28) if on_gpu else (512, 1 << 24)  # bfloat16 is slow on most CPUs

    def matmul_flop_per_us(dtype: torch.dtype) -> float:
        a = torch.randn(side, side, dtype=dtype, device=device)  # of numbers that are all alike a GPU makes shorter work
        return 2 * side**3 / _seconds(lambda: a @ a, device) / 1e6

    there = torch.ones(size, dtype=torch.uint8, device=device)
    here = torch.ones(size, dtype=torch.uint8, pin_memory=on_gpu)
    out = size / _seconds(lambda: here.copy_(there, non_blocking=True), device) / 1e6
    back = size / _seconds(lambda: there.copy_(here, non_blocking=True), device) / 1e6
    return dataclasses.replace(
        base,
        half_flop_per_us=matmul_flop_per_us(torch.bfloat16),
        float_flop_per_us=matmul_flop_per_us(torch.float32),
        bytes_per_us=2 * size / _seconds(there.clone, device) / 1e6,
        link=base.link._replace(out_bytes_per_us=out, in_bytes_per_us=back),
        memory_bytes=torch.accelerator.get_memory_info(device)[1] if on_gpu else 0,
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of five, after one to warm up."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    best = float("inf")
    for _ in range(6):
        wait()
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
