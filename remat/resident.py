"""Memory that is there before a step begins: parameters, buffers, inputs, gradients, and the optimizer's state."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from remat import _torch
from remat._torch import pytree


def resident_bytes(inputs: Sequence[torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes resident during every step, each storage once.

    inputs: the tensors that one call reads. An optimizer without state yet is asked what it will hold.
    """
    own = itertools.chain(model.parameters(), model.buffers(), inputs)
    tensors = [t for tensor in own for t in (tensor, tensor.grad if tensor.is_leaf else None) if t is not None]
    return _bytes(tensors) + (0 if optimizer is None else optimizer_bytes(optimizer))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state; predicted by one step on fake tensors where there is none yet."""
    if optimizer.state:
        return _bytes(t for t in pytree.tree_leaves(dict(optimizer.state)) if isinstance(t, torch.Tensor))
    with _torch.FakeTensorMode():
        groups = [{**group, "params": [_fake_trained(p) for p in group["params"]]} for group in optimizer.param_groups]
        make: Any = type(optimizer)  # each group carries its hyperparameters
        twin = make(groups)
        with contextlib.suppress(_torch.DataDependentOutputException):  # state is made before any value is read
            twin.step()
        return _bytes(t for t in pytree.tree_leaves(dict(twin.state)) if isinstance(t, torch.Tensor))


def _fake_trained(parameter: torch.Tensor) -> nn.Parameter:
    fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device))
    fake.grad = torch.empty_like(fake) if parameter.requires_grad else None
    return fake


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {_torch.storage_key(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
