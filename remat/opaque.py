"""What a model may do in forward that an exported graph would drop in silence, or do once and for all.

While a model is exported each of these is an error, or what a graph can do in its place.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import traceback
import types
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules import batchnorm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint, module_tracker

from remat._torch import FunctionBase, has_storage, pytree, storage_key
from remat.function_capture import OpaqueFunction, call_as_op
from remat.kept import kept_tensors
from remat.patches import here
from remat.state import PLAIN

log = logging.getLogger("remat")

CHECKPOINTS = "checkpoints itself with torch.utils.checkpoint"
GRADIENTS = "takes a gradient in forward (torch.autograd.grad)"
AVERAGES = "averages batch norm over all batches (momentum=None) by a factor that it reads from a counter"
_EMBEDDINGS = (torch.nn.functional.embedding, torch.nn.functional.embedding_bag)
_SEEDS = (
    *((place, name) for place in (torch, torch.random) for name in ("manual_seed", "set_rng_state")),
    *((torch.cuda, name) for name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all")),
    (torch.random, "fork_rng"),
)
_SET_ATTRIBUTE = nn.Module.__setattr__
_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class OpaqueAutograd(Exception):
    """A model did what an exported graph would silently drop: `what` says so, of "the model"."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@contextlib.contextmanager
def watch_for_opaque_autograd(model: nn.Module) -> Iterator[set[str]]:
    """Raise OpaqueAutograd where `model` checkpoints itself, calls an autograd.Function that no op can stand for, hooks or
    detaches a tensor in place, keeps one that has a gradient, writes to one where autograd does not see it, or seeds.

    Non-strict export runs through all of these, and keeps none of them. Gives the names of buffers that the model assigns to.
    """
    functions = _Functions()
    state = _State(functions)
    with _no_checkpoints(), _functions_as_ops(), _no_hooks(), _no_gradients(), _no_seeds(), _watching(state, model), functions:
        yield state.assigned


def _is_torch(frame: types.FrameType) -> bool:
    return str(frame.f_globals["__name__"]).startswith("torch.")


def _is_within(module: types.ModuleType) -> bool:
    """Whether some function of it has called."""
    return any(frame.f_globals.get("__name__") == module.__name__ for frame, _ in traceback.walk_stack(sys._getframe()))


class _Functions(TorchFunctionMode):
    """Sees the functions that a model calls. (A mode that sees ops and not functions would change what export makes of
    gradients within forward.)

    Raises OpaqueAutograd where the model writes to a tensor that has a gradient and autograd does not see it: without grad, or
    through `detach`. The values change then, and the gradient does not. `read` are the tensors that are no results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._training: dict[int, torch.UntypedStorage] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # a branch of `torch.cond`, which is for compiled steps anyway
            return func(*args, **kwargs)
        if func == _DATA:
            return args[0].detach()
        if func == torch.Tensor.__float__ and _is_within(batchnorm):
            raise OpaqueAutograd(AVERAGES)
        if func in (torch.Tensor.detach_, torch.detach_) and args[0].requires_grad:
            raise OpaqueAutograd("detaches a tensor in place (detach_(); detach() is kept)")
        tensors = _tensors((args, kwargs))
        if getattr(func, "__name__", "") != "__get__":
            self.read.update(map(id, tensors))
        for tensor in tensors:
            if tensor.requires_grad:
                self._training[storage_key(tensor)] = tensor.untyped_storage()
        is_renormed = func in _EMBEDDINGS and kwargs.get("max_norm") is not None  # their weights, without grad
        for tensor in _tensors(args[1] if is_renormed else _written(func, args, kwargs)):
            is_seen = tensor.requires_grad and torch.is_grad_enabled() and not is_renormed
            if not is_seen and storage_key(tensor) in self._training:
                raise OpaqueAutograd("writes without grad to a tensor that has a gradient")
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors that have a storage."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and has_storage(leaf)]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function writes to, by the names of functions and arguments."""
    name = getattr(func, "__name__", "")
    is_named = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    is_operator = name == "__setitem__" or (name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}"))  # y *= 2
    return args[:1] if is_named or is_operator or kwargs.get("inplace") else kwargs.get("out")


def _no_checkpoints() -> contextlib.AbstractContextManager[Any]:
    def no_checkpoint(*_: Any, **__: Any) -> Any:
        raise OpaqueAutograd(CHECKPOINTS)

    checkpointed = checkpoint._checkpoint_without_reentrant_generator
    return mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", here(no_checkpoint, checkpointed))


def _functions_as_ops() -> contextlib.AbstractContextManager[Any]:
    """Autograd functions of the model's own are called as ops, also where they are kept by name (`f = F.apply`)."""
    within: list[type] = []
    in_c: Any = inspect.getattr_static(FunctionBase, "apply")

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return in_c.__get__(None, cls)(*args, **kwargs)

    def function(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is checkpoint.CheckpointFunction:
            raise OpaqueAutograd(CHECKPOINTS)
        if cls.__module__.startswith("torch.") or within:
            return apply(cls, *args, **kwargs)
        within.append(cls)
        try:
            return call_as_op(cls, args, kwargs)
        except OpaqueFunction as error:
            raise OpaqueAutograd(f"has an autograd function that {error} ({cls.__module__}.{cls.__qualname__})") from error
        finally:
            within.pop()

    return mock.patch.object(FunctionBase, "apply", classmethod(here(function, apply)), create=True)


def _no_hooks() -> contextlib.AbstractContextManager[Any]:
    def no_hook(*_: Any) -> Any:
        if _is_within(module_tracker):  # which `FlopCounterMode` has in every module
            return types.SimpleNamespace(remove=lambda: None)
        raise OpaqueAutograd("hooks the gradient of a tensor in forward")

    return mock.patch.object(torch.Tensor, "register_hook", here(no_hook, torch.Tensor.register_hook))


def _no_gradients() -> contextlib.AbstractContextManager[Any]:
    theirs = torch.autograd.grad

    def ours(*args: Any, **kwargs: Any) -> Any:
        if _is_torch(sys._getframe(2)):  # torch.func's, which says so itself
            return theirs(*args, **kwargs)
        raise OpaqueAutograd(GRADIENTS)

    return mock.patch.object(torch.autograd, "grad", here(ours, theirs))


@contextlib.contextmanager
def _no_seeds() -> Iterator[None]:
    """Random numbers are drawn by the ops of a graph, from the state that there is."""
    with contextlib.ExitStack() as stack:
        for place, name in _SEEDS:
            stack.enter_context(mock.patch.object(place, name, _unseeded(getattr(place, name), name)))
        yield


def _unseeded(theirs: Any, name: str) -> Any:
    def ours(*args: Any, **kwargs: Any) -> Any:
        if _is_torch(sys._getframe(2)):
            return theirs(*args, **kwargs)
        raise OpaqueAutograd(f"sets the state of random numbers (torch's {name}) in forward")

    return here(ours, theirs)


class _State:
    """What a forward does to its modules' attributes. Buffers that it assigns to, in `assigned` by path and name, are written
    to once it is through, so that what it has read of them before is as it was.

    Raises OpaqueAutograd where a tensor with a gradient is kept beyond the call, a buffer gets another shape, or another tensor
    is replaced that the forward reads. Says what else changes, which planned steps will not.
    """

    def __init__(self, functions: _Functions) -> None:
        self.assigned: set[str] = set()
        self._functions = functions
        self._known: set[int] = set()
        self._before: dict[tuple[str, str], Any] = {}
        self._buffers: dict[tuple[int, str], tuple[dict[str, Any], torch.Tensor]] = {}

    def enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        for found in (self._known, self._before, self._buffers, self._functions.read):  # of an earlier run
            found.clear()
        self._known.update(map(id, (*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs)))))
        self._before.update(_attributes(model))

    def assign(self, module: nn.Module, name: str, value: Any) -> None:
        """In the place of `nn.Module.__setattr__`."""
        buffers = module.__dict__.get("_buffers", {})
        like = [(t.shape, t.dtype) for t in (value, buffers.get(name)) if isinstance(t, torch.Tensor)]
        if _is_torch(sys._getframe(2)):  # torch.nn.utils.weight_norm computes a weight for each forward
            _SET_ATTRIBUTE(module, name, value)
        elif isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf:
            raise OpaqueAutograd(f"keeps a tensor with a gradient as {type(module).__name__}.{name}")
        elif name not in buffers or value is buffers[name]:
            _SET_ATTRIBUTE(module, name, value)
        elif len(like) == 2 and like[0] == like[1]:
            self._buffers.setdefault((id(buffers), name), (buffers, buffers[name]))
            buffers[name] = value
        else:
            raise OpaqueAutograd(f"gives its buffer {type(module).__name__}.{name} another shape or type in forward")

    def leave(self, model: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        for where, tensor in kept_tensors(model, (args, kwargs)):
            if tensor.requires_grad and id(tensor) not in self._known:
                raise OpaqueAutograd(f"keeps a tensor with a gradient beyond its call ({where})")
        paths = {id(module._buffers): path for path, module in model.named_modules()}
        for (_, name), (buffers, buffer) in self._buffers.items():
            with torch.no_grad():
                buffer.copy_(buffers[name])
            buffers[name] = buffer
            self.assigned.add(f"{paths[id(buffers)]}.{name}".strip("."))
        changed = []
        for (path, name), value in _attributes(model).items():
            was = self._before.get((path, name))
            if isinstance(was, torch.Tensor) and was is not value and id(was) in self._functions.read:
                raise OpaqueAutograd(f"replaces {f'{path}.{name}'.strip('.')}, a tensor that it reads")
            if type(value) in PLAIN and (type(was), was) != (type(value), value):
                changed.append(name)
        if changed:
            say_changed(type(model).__name__, tuple(dict.fromkeys(changed)))


@contextlib.contextmanager
def _watching(state: _State, model: nn.Module) -> Iterator[None]:
    def elsewhere(*_: Any) -> None:
        """Another thread's forward."""

    hooks = [
        model.register_forward_pre_hook(here(state.enter, elsewhere), with_kwargs=True),
        model.register_forward_hook(here(state.leave, elsewhere), with_kwargs=True),
    ]
    try:
        with mock.patch.object(nn.Module, "__setattr__", here(state.assign, _SET_ATTRIBUTE)):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Those of all modules that are public, by path and name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
        for name, value in vars(module).items()
        if not name.startswith("_")
    }


@cache
def say_changed(model: str, names: tuple[str, ...]) -> None:
    """Once for each model, and the attributes that it changes."""
    log.warning(
        "%s changes %s in forward: planned steps, which run its graph and not its Python, leave that as it was before",
        model,
        ", ".join(names),
    )
