"""The module that `remat.optimize` returns: it runs rewritten graphs and otherwise behaves as the module it came from.

It shares the original's parameters, buffers and submodules (the same objects under the same names), its signature, its
output type and its other attributes. For each kind of call (shapes, dtypes, constants, autocast, which parameters train) it
captures and plans once, and plans once more for a step that adds to gradients. In `eval()` or without grad it runs the original
forward, since there is nothing to save.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn

from remat._torch import pytree
from remat.assembly import Region, adopt, recompile_text_only, runnable
from remat.capture import Captured
from remat.errors import BudgetError, RematError
from remat.passes.regions import RegionGraph
from remat.plan import Plan
from remat.runtime import one_step
from remat.shapes import dynamic_axes
from remat.table import announce

log = logging.getLogger("remat")
ADDS = "Gradients are there already, to which this step adds."


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """A call's leaves and their structure; keyword arguments in order of name."""
    return pytree.tree_flatten((args, {name: kwargs[name] for name in sorted(kwargs)}))


def leaves_key(flat: list[Any], spec: Any) -> Any:
    """Equal for calls that a graph cannot tell apart."""
    leaves = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in flat
    )
    return spec, leaves


def call_key(model: nn.Module, flat: list[Any], spec: Any) -> Any:
    """Equal for calls of a model that one plan serves."""
    device = device_type(model)
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    trains = tuple(p.requires_grad for p in model.parameters())
    modes = tuple(m.training for m in model.modules())
    return leaves_key(flat, spec), autocast, trains, modes


@dataclass(frozen=True)
class Variant:
    """One rewritten graph: `run` takes the flat tensor inputs, and serves calls whose key is `key`. `adds` says whether
    gradients were there already, to which the step adds its own: that takes another plan."""

    key: Any
    adds: bool
    captured: Captured
    plan: Plan
    outer: fx.Graph
    regions: tuple[RegionGraph, ...]
    run: fx.GraphModule


class Build(Protocol):
    """Captures, plans and rewrites one kind of call; `captured` is what such a call was captured as before, if it was."""

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured | None
    ) -> tuple[Captured, Plan, fx.Graph, tuple[RegionGraph, ...]]: ...


class RematModule(fx.GraphModule):
    """See the module's docstring. `plan` is the plan of the latest kind of call, None before the first."""

    def __init__(self, original: nn.Module, build: Build, dynamic_shapes: Any = None) -> None:
        super().__init__(nn.Module(), fx.Graph(), f"Remat{type(original).__name__}")
        self.__dict__["_original"] = original
        self.__dict__["_build"] = build
        self.__dict__["_variants"] = []
        self.plan: Plan | None = None
        self.__dict__["_dynamic_shapes"] = dynamic_shapes
        self._said: set[str] = set() if dynamic_shapes is None else {"again"}
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled():
            self._say("eval", "runs the original forward in eval mode and without grad: nothing is saved there")
            return self._original(*args, **kwargs)
        flat, spec = flatten_call(args, kwargs)
        variant = self._find(flat, spec)
        if variant is None:
            variant = self.capture(args, kwargs)
        elif variant.plan is not self.plan and not torch.compiler.is_compiling():
            self._show(variant)
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        moves = len(variant.plan.transfers) > 0
        if moves and torch.compiler.is_compiling():
            raise RematError("a plan that offloads runs eagerly; compile the original model with backend='remat' instead")
        with torch.autocast(device_type(self), enabled=False), one_step() if moves else contextlib.nullcontext():
            results = variant.run(*tensors)
        return variant.captured.output_of(results)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """Capture and plan for calls like this one. `optimize` does it ahead when given example inputs."""
        if torch.compiler.is_compiling():
            raise RematError("this module has not captured a call like this; call it once before torch.compile")
        if self._variants:
            self._say("again", "plans again: the inputs differ from those before, or there are gradients to add to")
        inspect.signature(self._original.forward).bind(*args, **kwargs)  # a wrong call is a TypeError, as it always was
        if self._dynamic_shapes is not None:
            dynamic_axes(self._original, args, kwargs, self._dynamic_shapes)  # raises for axes that this call does not have
        key = call_key(self._original, *flatten_call(args, kwargs))
        known = next((variant.captured for variant in self._variants if variant.key == key), None)
        try:
            captured, plan, outer, regions = self._build(self._original, args, kwargs, known)
        except BudgetError as error:
            if self._adds():
                error.args = (f"{error} {ADDS}",)
            raise
        run = runnable(self._original, captured, outer, regions)
        variant = Variant(key, self._adds(), captured, plan, outer, regions, run)
        self._variants.append(variant)
        self._show(variant)
        announce(variant.plan)
        return variant

    def _show(self, variant: Variant) -> None:
        for name in [name for name in self._modules if name.startswith("region_")]:
            del self._modules[name]
        for name, child in variant.run._modules.items():
            if isinstance(child, Region):
                self._modules[name] = child
        self.plan = variant.plan
        self.graph = variant.run.graph

    def _find(self, flat: list[Any], spec: Any) -> Variant | None:
        key, adds = call_key(self._original, flat, spec), self._adds()
        return next((variant for variant in self._variants if variant.key == key and variant.adds == adds), None)

    def _adds(self) -> bool:
        return any(p.grad is not None for p in self._original.parameters())

    def _say(self, topic: str, message: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            log.info("%s %s", type(self._original).__name__, message)

    def train(self, mode: bool = True) -> RematModule:
        self._original.train(mode)
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RematModule:
        twin = RematModule(copy.deepcopy(self._original, memo), self._build)
        memo[id(self)] = twin
        twin.__dict__["_forward_hooks"] = copy.deepcopy(self._forward_hooks, memo)
        for v in self._variants:
            run = runnable(twin._original, v.captured, v.outer, v.regions)
            twin._variants.append(Variant(v.key, v.adds, v.captured, v.plan, v.outer, v.regions, run))
        if twin._variants:
            twin._show(twin._variants[-1])
        return twin

    def __copy__(self) -> RematModule:
        return RematModule(self._original, self._build)

    def __reduce__(self) -> Any:
        """Pickled as the original module and how to plan; the graph is captured again at the first call."""
        return _unpickle, (self._original, self._build, self.plan)


def _unpickle(original: nn.Module, build: Build, plan: Plan | None) -> RematModule:
    module = RematModule(original, build)
    module.plan = plan
    return module


def _with_signature(forward: Any, signature: inspect.Signature) -> Any:
    @functools.wraps(forward)
    def wrapped(self: RematModule, *args: Any, **kwargs: Any) -> Any:
        return RematModule.forward(self, *args, **kwargs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped


def device_type(module: nn.Module) -> str:
    """Of the device that the model is on."""
    parameter = next(module.parameters(), None)
    return parameter.device.type if parameter is not None else "cpu"
