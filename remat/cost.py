"""What an op costs: time by roofline, scratch memory by asking the op once.

Time is the larger of arithmetic and memory traffic (Williams et al. 2009), with floating point operations from
`torch.utils.flop_counter` and a traffic factor for op classes that are far from a plain copy. It is analytic, so that the
same model gives the same plan everywhere. Scratch memory (what a kernel allocates beyond its outputs) is in no graph: each
distinct op is run once under the meter, on uninitialised inputs of its real shape, and remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remat import _torch
from remat._torch import pytree
from remat.program import Link

aten = torch.ops.aten


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of a device: arithmetic, memory traffic in bytes, a fixed cost per kernel, and the way to the host."""

    name: str
    flop_per_us: float
    bytes_per_us: float
    launch_us: float
    recompute_launch_us: float
    random_ns_per_element: float
    transcendental_ns_per_element: float
    link: Link


CPU = DeviceProfile("cpu", 120e3, 12e3, 3.0, 3.0, 3.0, 0.6, Link(6e3, 6e3, overlaps=False, start_us=3.0))
CUDA = DeviceProfile("cuda", 400e6, 2.5e6, 4.0, 6.0, 0.0, 0.0, Link(20e3, 20e3, overlaps=True, start_us=10.0))

_TRANSCENDENTAL = {
    "gelu", "gelu_backward", "silu", "silu_backward", "sigmoid", "tanh", "exp", "log", "sin", "cos", "erf", "_softmax",
    "_log_softmax", "pow", "rsqrt", "sqrt", "mish", "elu", "softplus",
}  # fmt: skip


def profile_of(device: torch.device) -> DeviceProfile:
    """The profile that costs on `device` are computed with."""
    return CUDA if device.type == "cuda" else CPU


def op_cost_us(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, device: DeviceProfile) -> float:
    """Time of one op in microseconds, from its arguments and result (real, fake or meta tensors)."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    traffic = sum(t.numel() * t.element_size() for t in tensors + results)
    elements = sum(t.numel() for t in results)
    time = max(_flops(op, args, kwargs, out) / device.flop_per_us, traffic / device.bytes_per_us)
    name = op.__name__.split(".")[0] if hasattr(op, "__name__") else str(op)
    if isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags:
        time += elements * device.random_ns_per_element * 1e-3
    elif name in _TRANSCENDENTAL:
        time += elements * device.transcendental_ns_per_element * 1e-3
    return time + device.launch_us


def _flops(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    packet = getattr(op, "overloadpacket", None)
    if packet is None or packet not in _torch.flop_registry:
        return _flops_of_cpu_attention(op, args)
    return float(_torch.flop_registry[packet](*args, **kwargs, out_val=out))


def _flops_of_cpu_attention(op: Any, args: Sequence[Any]) -> float:
    if op is aten._scaled_dot_product_flash_attention_for_cpu.default:
        query, key, matmuls = args[0], args[1], 2
    elif op is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        query, key, matmuls = args[1], args[2], 5
    else:
        return 0.0
    batch, heads, length, width = query.shape
    return float(2 * matmuls * batch * heads * length * key.shape[2] * width)
