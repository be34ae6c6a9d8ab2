"""What an op costs in time, by roofline.

Time is the larger of arithmetic and memory traffic (Williams et al. 2009), with floating point operations from
`torch.utils.flop_counter` and a traffic factor for op classes that are far from a plain copy. It is analytic, so that the
same model gives the same plan everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any, NamedTuple

import torch

from remat import _torch, loss
from remat._torch import pytree
from remat.devices import DeviceProfile

aten = torch.ops.aten


_TRANSCENDENTAL = dict.fromkeys(
    [
        "gelu", "gelu_backward", "silu", "silu_backward", "sigmoid", "exp", "sin", "cos", "_softmax",
        "_log_softmax", "pow", "rsqrt", "sqrt", "mish", "elu", "softplus",
    ],
    1.0,
) | {"erf": 1.6, "log": 2.0, "tanh": 4.0}  # fmt: skip

_LOSSES = {loss.cross_entropy._opoverload: 4, loss.cross_entropy_backward._opoverload: 8}


def op_cost_us(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, device: DeviceProfile) -> float:
    """Time of one op in microseconds, from its arguments and result (real, fake or meta tensors)."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    traffic = sum(t.numel() * t.element_size() for t in tensors + results)
    elements = sum(t.numel() for t in results)
    if op in _LOSSES:  # one pass over the rows for each of the ops inside
        elements = max(t.numel() for t in tensors)
        traffic += _LOSSES[op] * elements * torch.float32.itemsize
    dtype = results[0].dtype if results else torch.float32
    time = max(_flops(op, args, kwargs, out) / device.flop_per_us(dtype), traffic / device.bytes_per_us)
    return time + arithmetic_us(op, elements, device) + device.launch_us


def arithmetic_us(op: Any, elements: int, device: DeviceProfile) -> float:
    """Time of what an op does to each element of its result beyond reading and writing it: all that the op costs where a
    compiler fuses it into its reader."""
    name = op.__name__.split(".")[0] if hasattr(op, "__name__") else str(op)
    if isinstance(op, _torch.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags:
        nanoseconds = device.random_ns_per_element
    elif name == "inductor_random":
        nanoseconds = device.fused_random_ns_per_element
    else:
        nanoseconds = _TRANSCENDENTAL.get(name, 0.0) * device.transcendental_ns_per_element
    return elements * nanoseconds * 1e-3


def _flops(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    packet = getattr(op, "overloadpacket", None)
    if packet is None or packet not in _torch.flop_registry:
        return _flops_of_cpu_attention(op, args) + _flops_of_custom_products(op, args, kwargs, out)
    return float(_torch.flop_registry[packet](*args, **kwargs, out_val=out))


def _flops_of_custom_products(op: Any, args: Any, kwargs: Any, out: Any) -> float:
    """What an op of another library computes if it is a matrix product by its shapes, or the backward of one, such as those of
    grouped experts: (S, K) and (E, K, N) to (S, N)."""
    if getattr(op, "namespace", "aten") in ("aten", "prims", "remat"):
        return 0.0
    given, made = _matrices((args, kwargs)), _matrices(out)
    return sum(max((_product_flops(x, y, result) for x, y in permutations(given, 2)), default=0.0) for result in made)


def _matrices(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]


def _product_flops(x: torch.Tensor, y: torch.Tensor, result: torch.Tensor) -> float:
    """Floating point operations of x @ y, x @ y.mT or x.mT @ y if that has the result's shape; matrices may be in groups."""
    if x.shape == y.shape == result.shape:
        return 0.0
    of_x, of_y, of_result = map(_Sizes.of, (x, y, result))
    if of_x.height == of_result.height and (of_x.columns, of_result.columns) in (of_y[:2], of_y[1::-1]):
        return 2.0 * result.numel() * x.shape[-1]
    if of_x.height == of_y.height and of_result[:2] == (of_x.columns, of_y.columns):
        return 2.0 * x.numel() * y.shape[-1]
    return 0.0


class _Sizes(NamedTuple):
    """A matrix's sizes, and the rows of all in its group, as text: to compare symbols would add guards on them."""

    rows: str
    columns: str
    height: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Sizes:
        return cls(*map(str, (*tensor.shape[-2:], tensor.numel() // tensor.shape[-1])))


def _flops_of_cpu_attention(op: Any, args: Sequence[Any]) -> float:
    if op is aten._scaled_dot_product_flash_attention_for_cpu.default:
        query, key, matmuls = args[0], args[1], 2
    elif op is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        query, key, matmuls = args[1], args[2], 5
    else:
        return 0.0
    batch, heads, length, width = query.shape
    return float(2 * matmuls * batch * heads * length * key.shape[2] * width)
