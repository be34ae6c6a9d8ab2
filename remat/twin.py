"""A model's twin on fake tensors: the same Python, run to see what it does, with nothing allocated and nothing changed.

Modules are copied one by one and share all attributes but parameters, buffers and submodules; a deep copy is more than some
models allow (those under `fully_shard`, whose state holds process groups).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from remat import _torch
from remat._torch import pytree
from remat.values import KnownValues

_COMPILED = "_compiled_call_impl"  # what nn.Module.compile puts in the place of a call, of the module itself
_SHARDING = "torch.distributed.fsdp"  # where the hooks of fully_shard are defined


class Twin:
    """`module` is the twin of `model`, which `of` gives for each of its modules; hooks of the model itself are left out.

    Parameters of `groups`, under `fully_shard`, are whole and in the type that they compute in. All that trains has a gradient
    if the step `adds` to them.
    """

    def __init__(self, model: nn.Module, groups: Sequence[_torch.ShardedGroup] = (), adds: bool = False) -> None:
        self._adds = adds
        self.mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
        self._values = KnownValues()
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._sharded = {(id(m), name): p for group in groups for p in group.parameters for m, name in p.places}
        self.module = self._module(model)
        for name in [name for name in self.module.__dict__ if "_hooks" in name]:
            self.module.__dict__[name] = type(self.module.__dict__[name])()

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of one of the model's modules."""
        return self._modules[id(module)]

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fake inputs like the given ones, whose values the twin knows as far as it needs them."""

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            found = self.like(tensor).requires_grad_(tensor.requires_grad)
            self._values.know(found, tensor)
            return found

        found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, fake, (args, kwargs))
        return found

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The twin runs within, on fake tensors."""
        with self.mode, self._values.told():
            yield

    def tensors(self) -> list[torch.Tensor]:
        """All parameters and buffers, and the gradients that they have."""
        found = list(self._tensors.values())
        return [*found, *(t.grad for t in found if t.is_leaf and t.grad is not None)]

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like this one, on its device."""
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def parameter(self, found: _torch.ShardedParameter) -> torch.Tensor:
        """The whole of a parameter of which this rank has a part."""
        key = id(found.shard)
        if key not in self._tensors:
            with self.mode:
                whole = torch.empty(found.shard.shape, dtype=found.dtype, device=found.shard.device)
            self._tensors[key] = nn.Parameter(whole, requires_grad=found.shard.requires_grad)
        return self._tensors[key]

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        twin: nn.Module = object.__new__(_torch.plain_type(module))
        self._modules[id(module)] = twin
        twin.__dict__.update(module.__dict__)
        for name, hooks in module.__dict__.items():
            if is_hooks(name, hooks):
                twin.__dict__[name] = type(hooks)((k, h) for k, h in hooks.items() if not _shards(h))
        twin.__dict__.pop(_COMPILED, None)
        if not isinstance(twin.__dict__.get("forward"), types.MethodType):
            twin.__dict__.pop("forward", None)
        for name, value in module.__dict__.items():
            if isinstance(value, types.MethodType) and value.__self__ is module and name in twin.__dict__:
                twin.__dict__[name] = types.MethodType(value.__func__, twin)
        twin.__dict__["_parameters"] = {
            name: self.parameter(self._sharded[id(module), name]) if (id(module), name) in self._sharded else self._tensor(p)
            for name, p in module._parameters.items()
        }
        twin.__dict__["_buffers"] = {name: self._tensor(b) for name, b in module._buffers.items()}
        twin.__dict__["_modules"] = {
            name: child if child is None else self._module(child) for name, child in module._modules.items()
        }
        return twin

    def _tensor(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or id(tensor) in self._tensors:
            return None if tensor is None else self._tensors[id(tensor)]
        fake = self.like(tensor)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            adds = tensor.grad is not None or (self._adds and tensor.requires_grad)
            fake.grad = self.like(tensor) if adds else None
        vars(fake).update(_torch.own_attributes(tensor))
        self._values.know(fake, tensor)
        self._tensors[id(tensor)] = fake
        return fake


def is_hooks(name: str, value: Any) -> bool:
    """True for an attribute in which a module keeps hooks."""
    return name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict)


def _shards(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith(_SHARDING)


def imitate(twin: nn.Module, model: nn.Module) -> None:
    """Give `twin` the model's own parameters, buffers, submodules and attributes, but not our `forward`, nor what it was
    compiled to, nor the hooks, which the model itself runs."""
    for name, value in model.__dict__.items():
        if name not in ("forward", "_remat", "training", _COMPILED):
            twin.__dict__[name] = type(value)() if is_hooks(name, value) else value


def without_hooks(module: nn.Module) -> nn.Module:
    """The module with its class's own `forward` and no hooks of its own: the same parameters, buffers and submodules."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__["training"] = module.training
    imitate(twin, module)
    return twin
