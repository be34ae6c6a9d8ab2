"""What a forward keeps beyond its call: in lists and dictionaries of its modules, in other objects, in globals, through hooks.

Planning runs the model's Python once, on fake tensors. What that leaves behind is taken back where it can be.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from remat import _torch
from remat.errors import CaptureError
from remat.measure import reach

_CONTAINERS = (list, dict, set)
_LRU_CACHE: Any = type(functools.lru_cache(len))


class KeptTensor(CaptureError):
    """A tensor of the graph is kept where nothing can take it back."""


@contextlib.contextmanager
def kept_as_before(model: nn.Module, args: Any, way_out: str) -> Iterator[list[str]]:
    """Within, the model runs on fake tensors; then its lists, dictionaries, sets and generators are as they were, and functions
    that cache fake tensors have forgotten their results. Afterwards what it gives names the attributes that were taken back.
    Raises KeptTensor where a tensor is kept still, with the way out."""
    attributes = [item for module in model.modules() for item in _plain(module).items()]
    before = [(name, value, value.copy()) for name, value in attributes if type(value) in _CONTAINERS]
    changed: list[str] = []
    known = {id(tensor) for _, tensor in kept_tensors(model, args)}
    states = [(generator, generator.get_state()) for generator in reached(model) if isinstance(generator, torch.Generator)]
    try:
        yield changed
    finally:
        for name, container, content in before:
            if not _same(container, content):
                changed.append(name)
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for generator, state in states:
            generator.set_state(state)
        for cached in _caches(model):
            cached.cache_clear()
    where = next((where for where, tensor in kept_tensors(model, args) if id(tensor) not in known), None)
    if where is not None:
        raise KeptTensor(f"the model keeps a tensor beyond its call ({where}), which no graph does; {way_out}")


def kept_tensors(model: nn.Module, args: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The fake tensors that a model and its code can reach, but for attributes, parameters and buffers; and where they are."""
    for path, module in model.named_modules():
        for name, value in sorted(_plain(module).items(), key=lambda item: item[0].startswith("_")):
            if not isinstance(value, torch.Tensor | nn.Module):
                yield from ((f"{path}.{name}".strip("."), tensor) for tensor in _fakes([value]))
    yield from (("outside of its modules", tensor) for tensor in _fakes([_code(model), args]))


def reached(model: nn.Module) -> Iterator[object]:
    """What the attributes of a model's modules and its code lead to."""
    return reach([*map(_plain, model.modules()), _code(model)], nn.Module)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are neither parameters, buffers nor submodules."""
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}


def _code(model: nn.Module) -> list[Any]:
    """The functions of a model's classes."""
    classes = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    theirs = [kind for kind in classes if not kind.__module__.startswith("torch.")]
    found = [getattr(value, "__func__", value) for kind in theirs for value in vars(kind).values()]  # also of static methods
    return [value for value in found if isinstance(value, types.FunctionType | _LRU_CACHE)]


def _fakes(roots: list[Any]) -> Iterator[torch.Tensor]:
    return (item for item in reach(roots, nn.Module) if isinstance(item, _torch.FakeTensor | _torch.FunctionalTensor))


def _caches(model: nn.Module) -> list[Any]:
    """Functions that have fake tensors among the results that they cache."""
    found = [item for item in reach(_code(model)) if isinstance(item, _LRU_CACHE)]
    return [cached for cached in found if next(_fakes(_results(cached)), None) is not None]


def _results(cached: Any) -> list[Any]:
    """What `functools.lru_cache` holds for a function, which only the garbage collector tells."""
    held = gc.get_referents(cached)
    held += [value for item in held if isinstance(item, dict) for value in item.values()]
    return [item for item in held if not isinstance(item, types.FunctionType | dict)]


def _same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(a is b and container[a] is content[b] for a, b in zip(container, content, strict=True))
    return all(a is b for a, b in zip(container, content, strict=True))
