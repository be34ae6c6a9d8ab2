"""Which axes of a model's inputs may change size, by name, and the same inputs in other sizes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from remat._torch import pytree
from remat.errors import RematError
from remat.state import flatten_call

Axes = dict[str, tuple[tuple[int, int], ...]]  # by name: (flat index of the input, axis)

_DEFAULTS = ("batch", "seq")  # the first and second axis of the inputs
_FORM = "says nothing of axes; write {'input_ids': {0: 'batch', 1: 'seq'}}, as for torch.export.export"


def named_axes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None) -> Axes:
    """The axes that may change: those that `dynamic_shapes` names, as `torch.export.export` takes it (a `Dim` or its name for
    an axis), or "batch" and "seq": the first and second axis of every input that is as long there as the first input is."""
    if dynamic_shapes is None:
        return _usual_axes(flatten_call(args, kwargs)[0])
    found: Axes = {}
    for place, axis, dim in dynamic_axes(model, args, kwargs, dynamic_shapes):
        name = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
        if name is not None:
            found[name] = (*found.get(name, ()), (place, axis))
    if not found:
        raise RematError("dynamic_shapes names no axis; write {'input_ids': {0: 'batch', 1: 'seq'}}")
    return found


def dynamic_axes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> list[tuple[int, int, Any]]:
    """What `dynamic_shapes` says, as (flat index of the input, axis, `Dim` or whatever stands there).

    Raises RematError for an argument or an axis that the call does not have.
    """
    leaves, spec = flatten_call(args, kwargs)
    places, named_places = pytree.tree_unflatten(list(range(len(leaves))), spec)
    named = {**inspect.signature(model.forward).bind_partial(*places).arguments, **named_places}
    if isinstance(dynamic_shapes, list | tuple):
        dynamic_shapes = dict(zip(named, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, Mapping):
        raise RematError(f"dynamic_shapes={dynamic_shapes!r} {_FORM}")
    found: list[tuple[int, int, Any]] = []
    for name, axes in dynamic_shapes.items():
        if name not in named:
            raise RematError(f"dynamic_shapes names {name!r}; this call has the arguments {', '.join(named)}")
        for place, axis, dim in _said(named[name], axes, name):
            size = getattr(leaves[place], "shape", ())
            if not isinstance(axis, int) or not 0 <= axis < len(size):
                raise RematError(f"dynamic_shapes names axis {axis!r} of {name}, of shape {'x'.join(map(str, size)) or '()'}")
            found.append((place, axis, dim))
    return found


def range_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, name: str) -> range:
    """The sizes that `dynamic_shapes` allows for the axes called `name`: those between the `min` and `max` of their `Dim`s."""
    found = [] if dynamic_shapes is None else dynamic_axes(model, args, kwargs, dynamic_shapes)
    dims = [dim for _, _, dim in found if isinstance(dim, torch.export.Dim) and dim.__name__ == name]
    return range(max([1, *(dim.min for dim in dims)]), min([sys.maxsize, *(dim.max + 1 for dim in dims)]))


def _usual_axes(leaves: list[Any]) -> Axes:
    tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    found: Axes = {}
    for axis, name in enumerate(_DEFAULTS):
        size = next((leaf.shape[axis] for _, leaf in tensors if leaf.dim() > axis), None)
        if size is not None:
            found[name] = tuple((i, axis) for i, leaf in tensors if leaf.dim() > axis and leaf.shape[axis] == size)
    return found


def _said(places: Any, spec: Any, name: str) -> Iterator[tuple[int, Any, Any]]:
    """`places` is an argument with flat indices for tensors, `spec` what is said of its axes."""
    if spec is None:
        return
    if not isinstance(spec, Mapping | list | tuple):
        raise RematError(f"dynamic_shapes: {spec!r} for {name} {_FORM}")
    if isinstance(places, int):
        pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        yield from ((places, axis, dim) for axis, dim in pairs)
        return
    inside: Any = dict(spec.items() if isinstance(spec, Mapping) else enumerate(spec))
    there: Any = places if isinstance(places, Mapping) else dict(enumerate(places))
    for key, part in inside.items():
        if key not in there:
            raise RematError(f"dynamic_shapes names {key!r} within {name}, where there are {', '.join(map(repr, there))}")
        yield from _said(there[key], part, name)


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes, name: str) -> int:
    """How long the axes called `name` are. Raises RematError if there are none, or they differ."""
    if not axes.get(name):
        raise RematError(f"no axis of the inputs is called {name!r}; there are {', '.join(map(repr, axes))}")
    leaves = flatten_call(args, kwargs)[0]
    sizes = {leaves[i].shape[axis] for i, axis in axes[name]}
    if len(sizes) > 1:
        raise RematError(f"the axes called {name!r} have different lengths: {sorted(sizes)}")
    return int(sizes.pop())


def resized(
    args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes, sizes: Mapping[str, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the given sizes: the same tensors where nothing changes, zeros where something does."""
    leaves, spec = flatten_call(args, kwargs)
    shapes = {i: list(leaf.shape) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    for name, size in sizes.items():
        for i, axis in axes[name]:
            shapes[i][axis] = size
    for i, shape in shapes.items():
        if list(leaves[i].shape) != shape:
            leaves[i] = leaves[i].new_zeros(shape).requires_grad_(leaves[i].requires_grad)
    new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
    return new_args, new_kwargs
