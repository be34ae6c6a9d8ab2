"""Memory that is there before a step begins: parameters, buffers, inputs, gradients, and the optimizer's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from remat import _torch
from remat._torch import pytree
from remat.devices import cuda_block_bytes
from remat.errors import RematError


def resident_memory(
    inputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    buffers: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
    adds: bool = False,
    others: Sequence[torch.Tensor] = (),
) -> dict[str, int]:
    """Bytes resident during every step by kind, each storage once; of a tensor that several ranks share this one's part.

    inputs: the tensors that one call reads. adds: gradients that are not there yet count too. An optimizer without state yet is
    asked what it will hold. others: what else is there.
    """
    gradients = [t.grad for t in (*parameters, *inputs) if t.is_leaf and t.grad is not None]
    groups: dict[str, Sequence[torch.Tensor]]
    groups = {"parameters": parameters, "buffers": buffers, "inputs": inputs, "gradients": gradients, "others": others}
    seen: set[int] = set()
    found = {kind: _bytes(tensors, seen) for kind, tensors in groups.items()}
    if adds:
        found["gradients"] += sum(_torch.local(p).nbytes for p in parameters if p.requires_grad and p.grad is None)
    return {**found, "optimizer": 0 if optimizer is None else optimizer_bytes(optimizer)}


def bytes_beside(tensors: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that share no storage with `others`, each storage once."""
    return _bytes(tensors, {_torch.storage_key(_torch.local(t)) for t in others})


def attributes_of(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that are attributes of modules without being parameters or buffers, such as the `weight` that
    `nn.utils.weight_norm` computes."""
    found = [t for module in model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor)]
    return [t for t in found if t.layout is torch.strided and not _torch.is_traceable_wrapper_subclass(t)]


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state; predicted by one step on fake tensors where there is none yet.

    Raises RematError where making the optimizer, or its step, takes more than parameters with gradients.
    """
    if optimizer.state:
        return _bytes(t for t in pytree.tree_leaves(dict(optimizer.state)) if isinstance(t, torch.Tensor))
    try:
        return sum(_state_bytes(type(optimizer), group) for group in optimizer.param_groups)
    except TypeError as error:  # its constructor or its step has arguments of its own
        raise RematError(
            f"what state {type(optimizer).__name__} will hold cannot be predicted ({error}): take its first step "
            "before, or leave optimizer= out and room for it in the budget"
        ) from error


def _state_bytes(kind: Any, group: dict[str, Any]) -> int:
    """Bytes of the state for one group of parameters, which carries its hyperparameters."""
    parts = [(_torch.local(p), p.requires_grad) for p in group["params"]]
    with _torch.FakeTensorMode():
        twin = kind([{**group, "params": [_fake_trained(*part) for part in parts]}])
        with contextlib.suppress(_torch.DataDependentOutputException):  # state is made before any value is read
            twin.step()
        return _bytes(t for t in pytree.tree_leaves(dict(twin.state)) if isinstance(t, torch.Tensor))


def there_bytes(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer | None, device: torch.device) -> int:
    """Bytes of these tensors, their gradients and the optimizer's state that are allocated on `device` already: nothing that an
    optimizer or a backward has yet to make, and nothing of tensors without memory."""
    state = [] if optimizer is None else pytree.tree_leaves(dict(optimizer.state))
    tensors = [t for t in (*tensors, *state) if isinstance(t, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return _bytes(t for t in tensors if t.device == device and not _torch.is_fake(t))


def _fake_trained(part: torch.Tensor, trains: bool) -> nn.Parameter:
    fake = nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device=part.device))
    fake.grad = torch.empty_like(fake) if trains else None
    return fake


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int] | None = None) -> int:
    """What storages not in `seen`, to which they are added, take of their device's memory."""
    seen = set() if seen is None else seen
    fresh = {_torch.storage_key(t): t for t in map(_torch.local, tensors) if _torch.storage_key(t) not in seen}
    seen.update(fresh)
    blocks = _cuda_blocks() if any(t.device.type == "cuda" and not _torch.is_fake(t) for t in fresh.values()) else {}
    return sum(_allocated_bytes(tensor, blocks) for tensor in fresh.values())


def _allocated_bytes(tensor: torch.Tensor, blocks: Mapping[int, int]) -> int:
    storage = tensor.untyped_storage()
    if tensor.device.type != "cuda":
        return storage.nbytes()
    block = None if _torch.is_fake(tensor) else blocks.get(storage.data_ptr())
    return cuda_block_bytes(storage.nbytes()) if block is None else block


def _cuda_blocks() -> dict[int, int]:
    """Bytes of the blocks that torch's CUDA allocator has given out, by address. It gives a tensor up to 1 MiB more than asked
    for rather than split a block (`CUDACachingAllocator`, `should_split`)."""
    if torch.cuda.get_allocator_backend() != "native":
        return {}
    segments = torch.cuda.memory_snapshot(include_traces=False)
    return {block["address"]: block["size"] for segment in segments for block in segment["blocks"]}
