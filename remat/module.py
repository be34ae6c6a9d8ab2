"""The module that `remat.optimize` returns: it runs rewritten graphs and otherwise behaves as the module it came from.

It shares the original's parameters, buffers and submodules (the same objects under the same names), its signature, its
output type and its other attributes, which are set on the original. For each kind of call (shapes, dtypes, constants, autocast,
and the model's state: remat/state.py) it captures and plans once, and plans once more for a step that adds to gradients. In
`eval()` or without grad it runs the original forward.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from remat import _torch
from remat.assembly import Region, adopt, recompile_text_only, runnable
from remat.captured import Captured
from remat.errors import CaptureError, RematError, telling_of_gradients
from remat.gate import Gate
from remat.plan import Plan
from remat.runtime import one_step
from remat.shapes import dynamic_axes
from remat.state import CallKey, call_key, device_type, flatten_call, is_step, keep, serves, tensors_of, used
from remat.table import announce
from remat.twin import is_hooks
from remat.whole import Rewriting, Rewritten

log = logging.getLogger("remat")
_OWN = ("plan", "capture", "_gate", "_rewrite", "_variants", "_original", "_dynamic_shapes", "_said_again")
_NOT_CAPTURED = "this module has not captured a call like this; call it once before torch.compile"


@dataclass(frozen=True)
class Variant:
    """One rewritten graph: `run` takes the flat tensor inputs, and serves calls whose key is `key`, which speaks of `modules`.
    `adds` says whether gradients were there already, to which the step adds its own: that takes another plan."""

    key: CallKey
    modules: tuple[nn.Module, ...]
    adds: bool
    rewritten: Rewritten
    run: fx.GraphModule

    @property
    def captured(self) -> Captured:
        return self.rewritten.captured

    @property
    def plan(self) -> Plan:
        return self.rewritten.plan

    def serves(self, key: CallKey, model: nn.Module) -> bool:
        """Whether it serves calls of this key, as the model is now."""
        return serves(self.key, self.modules, key) and self.captured.fits(model)


class RematModule(fx.GraphModule):
    """See the module's docstring. `plan` is the plan of the latest kind of call, None before the first."""

    def __init__(self, original: nn.Module, rewrite: Rewriting, dynamic_shapes: Any = None) -> None:
        if isinstance(original, RematModule):
            raise RematError("this module comes from remat.optimize and has a plan already; optimize the original")
        own = itertools.chain(original._parameters, original._buffers, original._modules)
        taken = next((name for name in own if name in _OWN), None)
        if taken is not None:
            raise RematError(f"the model has a parameter, buffer or submodule named {taken}, a name of remat's own; rename it")
        super().__init__(nn.Module(), fx.Graph(), f"Remat{type(original).__name__}")
        self._rewrite = rewrite
        self._gate = Gate()
        self._variants: list[Variant] = []
        self.plan: Plan | None = None
        self._dynamic_shapes = dynamic_shapes
        self._said_again = dynamic_shapes is not None
        self.__dict__["_original"] = original  # from here on, names that are not here yet are the original's
        adopt(self, original)
        self.training = original.training
        signature = inspect.signature(original.forward)
        type(self).forward = _with_signature(type(self).forward, signature)  # type: ignore[method-assign]

    def recompile(self) -> Any:
        return recompile_text_only(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
            return
        setattr(self._original, name, value)
        self._show_modules()

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
            return
        delattr(self._original, name)
        self._show_modules()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._original.add_module(name, module)
        self._show_modules()

    def _is_own(self, name: str) -> bool:
        """True for what GraphModule and this class set, and for private names of others that wrap this module."""
        original = self.__dict__.get("_original")
        if original is None or name in self.__dict__ or hasattr(type(self), name):
            return True
        return name.startswith("_") and not hasattr(original, name)

    def _show_modules(self) -> None:
        """The original's submodules as they are now, and the regions of the graph that is shown."""
        regions = {name: child for name, child in self._modules.items() if isinstance(child, Region)}
        self._modules = {**self._original._modules, **regions}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(args, kwargs)
        with self._gate.call():
            if not is_step(self._original, args, kwargs):
                return self._original(*args, **kwargs)
            flat, spec = flatten_call(args, kwargs)
            variant = self._find(flat, spec)
            if variant is not None:
                return self._run(variant, flat)
        with self._gate.capture():
            variant = self._find(flat, spec) or self.capture(args, kwargs)
        with self._gate.call():
            return self._run(variant, flat)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_step(self._original, args, kwargs):
            return self._original(*args, **kwargs)
        flat, spec = flatten_call(args, kwargs)
        return self._run(self._find(flat, spec) or self.capture(args, kwargs), flat)

    def _run(self, variant: Variant, flat: list[Any]) -> Any:
        if variant.plan is not self.plan and not torch.compiler.is_dynamo_compiling():
            used(self._variants, variant)
            self._show(variant)
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        moves = len(variant.plan.transfers) > 0
        if moves and torch.compiler.is_dynamo_compiling():
            raise RematError("a plan that offloads runs eagerly; compile the original model with backend='remat' instead")
        with torch.autocast(device_type(self), enabled=False), one_step() if moves else contextlib.nullcontext():
            results = variant.run(*tensors)
        return variant.captured.output_of(results)

    @_torch.not_compiled(_NOT_CAPTURED)
    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """Capture and plan for calls like this one. `optimize` does it ahead when given example inputs."""
        if self._variants and not self._said_again:
            self._said_again = True
            name = type(self._original).__name__
            log.info("%s plans again: the inputs differ from those before, or there are gradients to add to", name)
        if self._dynamic_shapes is not None:
            dynamic_axes(self._original, args, kwargs, self._dynamic_shapes)  # raises for axes that this call does not have
        if self._original._backward_hooks or self._original._backward_pre_hooks:
            raise CaptureError("the model has a backward hook, which no graph keeps; put it on what remat.optimize returned")
        flat, spec = flatten_call(args, kwargs)
        key = self._key(flat, spec)
        known = next((v.captured for v in self._variants if v.key == key and v.captured.fits(self._original)), None)
        with telling_of_gradients(self._adds()):
            rewritten = self._rewrite(self._original, args, kwargs, known)
        run = runnable(self._original, rewritten.captured, rewritten.outer, rewritten.regions)
        key, modules = self._key(flat, spec), tuple(self._original.modules())  # anew: a forward may count its calls
        variant = Variant(key, modules, self._adds(), rewritten, run)
        keep(self._variants, variant, "" if self._dynamic_shapes is not None else type(self._original).__name__)
        self._show(variant)
        announce(variant.plan)
        return variant

    def _show(self, variant: Variant) -> None:
        regions = {name: child for name, child in variant.run._modules.items() if isinstance(child, Region)}
        self._modules = {**self._original._modules, **regions}
        self.plan = variant.plan
        self.graph = variant.run.graph

    def _find(self, flat: list[Any], spec: Any) -> Variant | None:
        key, adds = self._key(flat, spec), self._adds()
        return next((v for v in self._variants if v.adds == adds and v.serves(key, self._original)), None)

    def _key(self, flat: list[Any], spec: Any) -> CallKey:
        modules = tuple(self._original.modules())
        return call_key(flat, spec, device_type(self), modules, tensors_of(modules))

    def _adds(self) -> bool:
        return any(p.grad is not None for p in self._original.parameters())

    def train(self, mode: bool = True) -> RematModule:
        self._original.train(mode)
        self.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._original.zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # where this module is part of the one that loads
        self._original._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RematModule:
        twin = RematModule(copy.deepcopy(self._original, memo), self._rewrite, self._dynamic_shapes)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._own_state(), memo))
        now, modules = tuple(self._original.modules()), tuple(twin._original.modules())
        for v in self._variants:
            if v.modules == now:
                key = v.key._replace(modules=tuple(map(id, modules)))
                run = runnable(twin._original, v.captured, v.rewritten.outer, v.rewritten.regions)
                twin._variants.append(dataclasses.replace(v, key=key, modules=modules, run=run))
        if twin._variants:
            twin._show(twin._variants[-1])
        return twin

    def __copy__(self) -> RematModule:
        twin = RematModule(self._original, self._rewrite, self._dynamic_shapes)
        twin.__dict__.update(self._own_state())
        return twin

    def __reduce__(self) -> Any:
        """Pickled as the original module and how to plan; the graph is captured again at the first call."""
        return _unpickle, (self._original, self._rewrite, self._dynamic_shapes, self.plan), self._own_state()

    def _own_state(self) -> dict[str, Any]:
        """What a copy takes over: hooks, and what has been said."""
        hooks = {name: value for name, value in self.__dict__.items() if is_hooks(name, value)}
        return {**hooks, "_is_full_backward_hook": self._is_full_backward_hook, "_said_again": self._said_again}


def _unpickle(original: nn.Module, rewrite: Rewriting, dynamic_shapes: Any, plan: Plan | None) -> RematModule:
    module = RematModule(original, rewrite, dynamic_shapes)
    module.plan = plan
    return module


def _with_signature(forward: Any, signature: inspect.Signature) -> Any:
    @functools.wraps(forward)
    def wrapped(self: RematModule, *args: Any, **kwargs: Any) -> Any:
        return RematModule.forward(self, *args, **kwargs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped
