"""A model's autograd functions while it is captured: each call is one op, which the captured graph has the function for.

Export runs through an autograd function and keeps the ops of its forward, whose derivative may be another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat._torch import pytree
from remat.functions import TENSOR, FunctionCall
from remat.passes.pinning import is_collective


class OpaqueFunction(Exception):
    """A function does what no op in a graph may."""


_calls: dict[int, FunctionCall] = {}
_structures: dict[int, Any] = {}  # what each call returns, with `TENSOR` for tensors
_keys = itertools.count()


@torch.library.custom_op("remat::function", mutates_args=())
def _function(key: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    raise AssertionError("stands for a function while a model is captured, on fake tensors")


@_function.register_fake
def _(key: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_(tensor.requires_grad).view_as(tensor) for tensor in tensors]  # no leaves
    versions = [tensor._version for tensor in given]
    watch = _Watch(given)
    with torch.enable_grad(), watch:
        found = _calls[key].structured(*given)
    if [tensor._version for tensor in given] != versions:
        raise OpaqueFunction("writes to a tensor that it is given")
    _calls[key].reads[:] = [real for real, _ in watch.others.values()]
    leaves, spec = pytree.tree_flatten(found)
    _structures[key] = pytree.tree_unflatten([TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _no_gradients(ctx: Any, *gradients: Any) -> Any:
    raise AssertionError("captured graphs are traced without backward")


_function.register_autograd(_no_gradients)


class _Watch(_torch.TorchDispatchMode):
    """Raises OpaqueFunction for ops that other ranks have to run as often, and for those that read parameters, buffers or
    results that are not given to the function: a recorded step would not know them.

    `others` are tensors that are none of these, with the fake ones that are read in their place.
    """

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._known = {_torch.storage_key(tensor): tensor.untyped_storage() for tensor in given}
        self._mode = next(iter(_torch.fake_modes(given)), None)
        self.others: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if _torch.is_fake(tensor) or self._mode is None:
            return tensor
        if id(tensor) not in self.others:
            with self._mode:
                fake = _torch.fake_like(tensor)
            self.others[id(tensor)] = tensor, fake
            self._known[_torch.storage_key(fake)] = fake.untyped_storage()
        return self.others[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_collective(func):
            raise OpaqueFunction("communicates with other ranks")
        kwargs = kwargs or {}
        if not all(map(_torch.is_fake, _written(func, args, kwargs))):
            raise OpaqueFunction("writes to a tensor that is not given to it")
        if func is not torch.ops.aten.lift_fresh.default:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is not torch.ops.aten.lift_fresh.default and any(_torch.storage_key(t) not in self._known for t in read):
            raise OpaqueFunction("reads a parameter, buffer or result that is not given to it")
        out = func(*args, **kwargs)
        made = (leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self._known.update((_torch.storage_key(tensor), tensor.untyped_storage()) for tensor in made)
        return out


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What an op writes to of what it is given."""
    if not isinstance(func, _torch.OpOverload):
        return []
    arguments = func._schema.arguments
    values = {**kwargs, **dict(zip((argument.name for argument in arguments), args, strict=False))}
    written = [values.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, torch.Tensor)]


def call_as_op(function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an autograd function through an op that stands for it. Raises OpaqueFunction for one that cannot be an op."""
    if kwargs:
        raise OpaqueFunction("takes arguments by name alone")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(isinstance(leaf, torch.Tensor) for a in args if not isinstance(a, torch.Tensor) for leaf in pytree.tree_leaves(a)):
        raise OpaqueFunction("takes tensors within another argument")
    arguments = tuple(TENSOR if isinstance(a, torch.Tensor) else a for a in args)
    kinds = dict.fromkeys(("cpu", *(tensor.device.type for tensor in tensors)))
    autocast = tuple((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds)
    key = next(_keys)
    _calls[key] = FunctionCall(function, arguments, autocast)
    results = iter(_function(key, tensors))
    return pytree.tree_map(lambda leaf: next(results) if leaf is TENSOR else leaf, _structures[key])


@contextlib.contextmanager
def capturing_functions() -> Iterator[Callable[[fx.Graph], None]]:
    """Within, autograd functions may be called as ops; gives what puts the functions themselves into a graph."""
    try:
        yield _with_functions
    finally:
        _calls.clear()
        _structures.clear()


def _with_functions(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.remat.function.default):
        key, tensors = node.args
        with graph.inserting_before(node):
            call = graph.call_function(_calls[key], tuple(tensors))
        call.meta = {**node.meta, "val": tuple(node.meta["val"])}
        node.replace_all_uses_with(call)
        graph.erase_node(node)
