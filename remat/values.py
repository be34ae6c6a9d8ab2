"""What the values of small tensors are while a model runs on fake ones.

Models look at masks and positions to choose their way (`if mask.all()`). Tensors of integers and truth values that are made
from nothing but such tensors are computed beside their fakes, so that a run on fake tensors goes the way that a real one does.
So are small tensors of real numbers that the code makes of nothing, since a mask may be `torch.ones(...)`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from remat import _torch
from remat._torch import pytree
from remat.patches import here

_SMALL = 2**20  # entries of real numbers that are computed with: a mask of tokens has fewer


class KnownValues(_torch.TorchDispatchMode):
    """Within it, over a fake mode, what is known about fake tensors decides; `know` tells the value of one."""

    def __init__(self) -> None:
        super().__init__()
        self._values = _torch.WeakTensorKeyDictionary()

    def know(self, fake: torch.Tensor, value: torch.Tensor) -> None:
        """The value of a fake tensor; the model may write to the fake one."""
        if not value.is_floating_point() and not value.is_complex() and not _torch.is_fake(value):
            self._keep(fake, value)

    def knows(self, tensor: Any) -> bool:
        """True for a fake tensor whose value is known."""
        return isinstance(tensor, torch.Tensor) and tensor in self._values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for constant in (tensor for tensor in tensors if not _torch.is_fake(tensor) and tensor not in self._values):
            if _is_computed(constant):
                self._keep(constant, constant)
        known = all(tensor in self._values for tensor in tensors) and torch.Tag.nondeterministic_seeded not in func.tags
        if known and func is torch.ops.aten._local_scalar_dense.default:
            with _torch.no_dispatch():
                return self._values[tensors[0]].item()
        out = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not known or not made or not all(map(_is_computed, made)):
            if func._schema.is_mutable:
                self._forget([self._values[tensor] for tensor in tensors if tensor in self._values])
            return out
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: self._values[t], (args, kwargs))
        with _torch.no_dispatch():
            values = func(*args, **kwargs)
        for fake, value in zip(made, pytree.tree_leaves(values), strict=True):
            self._values[fake] = value
        return out

    def _keep(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        with _torch.no_dispatch():
            self._values[tensor] = value.detach().clone()

    def _forget(self, values: list[torch.Tensor]) -> None:
        """Something unknown was written to one of these, or to what shares its storage."""
        gone = {_torch.storage_key(value) for value in values}
        for fake in [fake for fake, value in self._values.items() if _torch.storage_key(value) in gone]:
            del self._values[fake]

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Within, the mode is on, and transformers treats tensors whose values are known as real ones."""
        library: Any = sys.modules.get("transformers.utils.import_utils")
        asked: Any = getattr(library, "is_fake_tensor", None)

        def is_fake(tensor: Any) -> bool:
            return bool(asked(tensor)) and not self.knows(tensor)

        told: dict[str, Any] = {} if asked is None else {"is_fake_tensor": here(is_fake, asked)}
        with mock.patch.multiple(library, **told) if told else contextlib.nullcontext(), self:
            yield


def _is_computed(tensor: torch.Tensor) -> bool:
    """True for a tensor whose value is kept where it can be."""
    return tensor.numel() <= _SMALL or not (tensor.is_floating_point() or tensor.is_complex())
