"""What a captured graph takes for granted: the call, and of the model its modules, their hooks and attributes, its tensors.

Export runs the model's Python once, and what that reads stays in the graph. So a graph serves the calls of equal key, and what
a key cannot see is fixed when the model is captured: what is inside of lists, dictionaries and other objects (a configuration),
and attributes whose names start with "_".
"""

from __future__ import annotations

import functools
import itertools
import logging
import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from remat._torch import has_storage, pytree, storage_key

log = logging.getLogger("remat")

KEPT, OFTEN = 32, 8  # graphs of one model: how many are kept, and after how many captures it is said what makes them
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)  # activations; a forward that was replaced
PLAIN = frozenset((bool, int, float, str, types.NoneType, torch.dtype, torch.device, *_FUNCTIONS))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is a training step. Says so once where it is none though gradients are recorded."""
    if not torch.is_grad_enabled():
        return False
    if not any(p.requires_grad for p in model.parameters()) and not _requires_grad((args, kwargs)):
        return False
    if not model.training and not torch.compiler.is_dynamo_compiling():
        _say_unplanned(type(model).__name__)
    return model.training


def _requires_grad(tree: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(tree))


@functools.cache
def _say_unplanned(model: str) -> None:
    log.warning(
        "%s runs its own forward in eval mode, within no budget, and gradients are recorded: call it under torch.no_grad() to "
        "evaluate; to train, call train(), and eval() of those modules that shall not drop or count",
        model,
    )


class Constant(NamedTuple):
    """An argument that is no tensor. 1, 1.0 and True are equal, and make other graphs."""

    kind: type
    value: Any


class CallKey(NamedTuple):
    """Equal for calls of a model that one plan serves. `modules` are identities: whoever keeps a key keeps its modules.

    `same`: for each tensor, of the call and then of the model, the place of the first that is the same object; then the same of
    the storages of the call's. Under torch.compile, the tensors.
    """

    leaves: Any
    autocast: torch.dtype | None
    tensors: tuple[Any, ...]
    modules: tuple[int, ...]
    states: tuple[Any, ...]
    same: tuple[Any, ...]
    others: Any = ()


class Keyed(Protocol):
    """What serves the calls of one key; `modules` are those that the key speaks of."""

    @property
    def key(self) -> CallKey: ...
    @property
    def modules(self) -> tuple[nn.Module, ...]: ...


_K = TypeVar("_K", bound=Keyed)


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """A call's leaves and their structure; keyword arguments in order of name."""
    return pytree.tree_flatten((args, {name: kwargs[name] for name in sorted(kwargs)}))


def leaves_key(flat: list[Any], spec: Any) -> Any:
    """Equal for calls that a graph cannot tell apart."""
    leaves = [tensor_key(leaf) if isinstance(leaf, torch.Tensor) else Constant(type(leaf), leaf) for leaf in flat]
    return _structure(spec), tuple(leaves)


def _structure(spec: Any) -> Any:
    """A structure as tuples, which Dynamo can compare in every version of torch."""
    context = tuple(spec.context) if isinstance(spec.context, list) else spec.context
    return spec.type, context, tuple([_structure(child) for child in spec.children()])


def call_key(flat: list[Any], spec: Any, device: str, modules: Sequence[nn.Module], tensors: Sequence[torch.Tensor]) -> CallKey:
    """The key of a call with these leaves, of a model on `device` whose graph has `modules` and `tensors` in it."""
    given = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    found = tuple([tensor_key(tensor) for tensor in tensors])
    key = CallKey(leaves_key(flat, spec), autocast, found, tuple(map(id, modules)), (), (*given, *tensors))
    if torch.compiler.is_dynamo_compiling():
        return key
    same = _firsts(map(id, key.same)), _firsts(storage_key(leaf) if has_storage(leaf) else id(leaf) for leaf in given)
    return key._replace(states=tuple(map(_state, modules)), same=same)


def _firsts(keys: Iterable[int]) -> tuple[int, ...]:
    """For each key, the place of the first that is equal to it."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(key, place) for place, key in enumerate(keys)])


def serves(known: CallKey, modules: Sequence[nn.Module], key: CallKey) -> bool:
    """True if what was captured for a key, which speaks of `modules`, serves a call of another.

    Under torch.compile the states of modules are read here, and only what is compared, so that Dynamo watches that; all that is
    in a module takes it four times as long. For the same reason only what was one tensor is held to be one still.
    """
    if not torch.compiler.is_dynamo_compiling():
        return known == key
    if known._replace(states=(), same=()) != key._replace(same=()):
        return False
    is_same = all(key.same[place] is key.same[first] for place, first in enumerate(known.same[0]) if first != place)
    return is_same and all(map(_is_still, modules, known.states))


def _is_still(module: nn.Module, state: tuple[Any, Any]) -> bool:
    hooks, attributes = state
    if _hooks(module) != hooks:
        return False
    return all(kind in _FUNCTIONS or getattr(module, name, None) == value for name, kind, value in attributes)


def tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers of these modules alone."""
    return [t for m in modules for own in (m._parameters, m._buffers) for t in own.values() if t is not None]


def device_type(module: nn.Module) -> str:
    """Of the device that the model is on."""
    parameter = next(module.parameters(), None)
    return parameter.device.type if parameter is not None else "cpu"


def keep(found: list[_K], new: _K, model: str) -> None:
    """Add what a call was captured as; the one that has not served for longest goes where there are too many. Says once, unless
    `model` has no name, what has made many of them."""
    found.append(new)
    del found[:-KEPT]
    if len(found) == OFTEN and model:
        changes = (difference(a.key, b.key, b.modules) for a, b in itertools.pairwise(reversed(found)))
        log.warning(
            "%s has been captured and planned %d times, which takes time; the last calls differ in this: %s. Pass numbers that "
            "change from step to step as tensors, and pad inputs to a few lengths",
            model,
            OFTEN,
            next(filter(None, changes), "gradients are there already, or are not"),
        )


def used(found: list[_K], one: _K) -> None:
    """Note that one of these has served a call: those that served last are kept longest."""
    if found[-1] is not one:
        found[:] = [*(other for other in found if other is not one), one]


def difference(now: CallKey, before: CallKey, modules: Sequence[nn.Module]) -> str:
    """In what two keys differ, both of which are of `modules` unless that is it; "" where they do not."""
    if now.leaves != before.leaves:
        return leaves_difference(now.leaves, before.leaves)
    if now.autocast != before.autocast:
        return f"autocast: {now.autocast} for {before.autocast}"
    if now.modules != before.modules:
        return "other modules"
    for module, (hooks, attributes), (other_hooks, others) in zip(modules, now.states, before.states, strict=True):
        changed = sorted({name for name, *_ in set(attributes) ^ set(others)})
        if changed or hooks != other_hooks:
            return ", ".join(f"{type(module).__name__}.{name}" for name in changed or ("hooks",))
    if now.same != before.same:
        return "arguments or parameters that are one tensor"
    return "parameters of another type, shape, device or requires_grad" if now.tensors != before.tensors else ""


def leaves_difference(now: Any, before: Any) -> str:
    """In what two keys of `leaves_key` differ."""
    (spec, leaves), (other_spec, others) = now, before
    if spec != other_spec:
        return "other arguments"
    here, there = next((a, b) for a, b in zip(leaves, others, strict=True) if a != b)
    return f"{_shown(here)} for {_shown(there)}"


def _shown(leaf: Any) -> Any:
    return repr(leaf.value) if isinstance(leaf, Constant) else leaf


def tensor_key(tensor: Any) -> Any:
    """Equal for tensors that a graph takes alike; None for anything else."""
    if not isinstance(tensor, torch.Tensor):
        return None
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, _layout(tensor)


def _layout(tensor: torch.Tensor) -> Any:
    """What decides whether a view can be taken: strides, which say nothing where an axis has one entry."""
    if tensor.layout is not torch.strided:
        return tensor.layout
    return tuple([stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])


def _state(module: nn.Module) -> tuple[Any, Any]:
    """A module's hooks, and its plain attributes, `training` among them."""
    attributes = [
        (name, kind, value)
        for name, value in module.__dict__.items()
        if name[0] != "_" and ((kind := type(value)) in PLAIN or (kind is tuple and PLAIN.issuperset(map(type, value))))
    ]
    return _hooks(module), tuple(attributes)


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """The numbers of a module's hooks, which are never given twice."""
    return tuple([number for name in _HOOKS for number in getattr(module, name)])
