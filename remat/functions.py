"""A model's own `torch.autograd.Function` as an op of a captured graph: with the backward that its author wrote, and what it
saves known to the plan, since it saves through the hooks that all ops do."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from remat import _torch
from remat._torch import pytree


class _Tensor:
    """Stands where a tensor is given or returned."""

    def __reduce__(self) -> str:
        return "TENSOR"


TENSOR = _Tensor()


@dataclass(frozen=True, eq=False)
class FunctionCall:
    """One call of an autograd function, of its tensors alone; returns the tensors of what it returns, none of which shares
    memory with another or with what it was given.

    `arguments` are all that it takes, `TENSOR` for each tensor; `autocast` is what holds around it: a device's kind, a type and
    whether it casts. `reads` are tensors that its forward finds in other arguments, or elsewhere.
    """

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    autocast: tuple[tuple[str, torch.dtype, bool], ...]
    reads: list[torch.Tensor] = field(default_factory=list)

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for leaf in pytree.tree_leaves(self.structured(*tensors)) if isinstance(leaf, torch.Tensor))

    def structured(self, *tensors: torch.Tensor) -> Any:
        """What the function returns, as it returns it."""
        given = iter(tensors)
        arguments = [next(given) if argument is TENSOR else argument for argument in self.arguments]
        with contextlib.ExitStack() as stack:
            for kind, dtype, casts in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, casts))
            out = self.function.apply(*arguments)
        seen = {_torch.storage_key(tensor) for tensor in tensors}

        def own(tensor: torch.Tensor) -> torch.Tensor:
            key = _torch.storage_key(tensor)
            if key in seen:
                return tensor.clone()
            seen.add(key)
            return tensor

        return pytree.tree_map_only(torch.Tensor, own, out)
