"""The `forward` of a model that trains within a budget in place, and that of one rewritten as a whole."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from remat import _torch
from remat.errors import RematError
from remat.module import RematModule
from remat.plan import Plan
from remat.settings import Settings
from remat.state import is_step
from remat.twin import imitate, without_hooks
from remat.whole import Rewriting

log = logging.getLogger("remat")
_EAGER = "what remat.enable has rewritten runs eagerly; compile the original model with backend='remat'"


class Enabled:
    """The `forward` of an enabled model. `settings` say how to plan; `plan` is the plan of the latest kind of call.

    Copied and pickled with its model it stays the forward of that one, and plans anew.
    """

    plan: Plan | None

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.is_on = True
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self._modules: list[nn.Module] = []
        self.replan(settings)

    def install(self) -> None:
        """Become the model's forward."""
        self._modules = list(self.model.modules())
        self.model.__dict__["_remat"] = self
        self.model.forward = self

    def replan(self, settings: Settings) -> None:
        """Plan by these settings from now on."""
        self.settings = settings

    def __reduce__(self) -> Any:
        return type(self), (self.model, self.settings)

    @property
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        """The rewritten graphs that `plan` is for, by name."""
        raise NotImplementedError

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward that backward follows."""
        raise NotImplementedError

    def as_it_was(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward."""
        return type(self.model).forward(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Give the model its own forward back, also where another was put around ours meanwhile."""
        self.is_on = False
        del self.model.__dict__["_remat"]
        take_back(self.model, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if not self.is_on or not is_step(model, args, kwargs):
            return self.as_it_was(args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(self, args, kwargs)
        if kwargs.get("use_cache"):
            raise RematError("use_cache=True: training keeps no key-value cache, which nothing there reads; leave it out")
        found = list(model.modules())
        self._modules = self._modules or found
        if len(found) != len(self._modules) or any(a is not b for a, b in zip(found, self._modules, strict=True)):
            raise RematError(
                f"modules of {type(model).__name__} were added or replaced after remat was enabled for it; "
                "call remat.disable(model) before, and enable it again after"
            )
        return self.train(args, kwargs)


class EnabledWhole(Enabled):
    """One graph for the whole model."""

    _step: RematModule | None
    _inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self._inside = self._inside, True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._inside = before

    def install(self) -> None:
        super().install()
        for part in self._parts():
            part.register_forward_pre_hook(self._part_runs)

    def remove(self) -> None:
        super().remove()
        for part in self._parts():
            hooks = part._forward_pre_hooks
            for number in [number for number, hook in hooks.items() if hook == self._part_runs]:
                del hooks[number]

    def _parts(self) -> list[nn.Module]:
        """The children of the model that have its blocks in them: a transformer beside its head."""
        lists = nn.ModuleList | nn.Sequential
        return [child for child in self.model.children() if any(isinstance(module, lists) for module in child.modules())]

    def _part_runs(self, part: nn.Module, _: Any) -> None:
        is_own = self._inside or torch.compiler.is_compiling()  # in eval, or to be captured
        if self.is_on and not is_own and part.training and torch.is_grad_enabled():
            _say_part(type(part).__name__, type(self.model).__name__)

    def as_it_was(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self._step
        with contextlib.nullcontext() if step is None or torch.compiler.is_dynamo_compiling() else step._gate.call():
            return super().as_it_was(args, kwargs)

    @property
    def plan(self) -> Plan | None:  # type: ignore[override]
        return None if self._step is None else self._step.plan

    @property
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        return {} if self._step is None else {"outer": self._step}

    def replan(self, settings: Settings) -> None:
        super().replan(settings)
        self._step = None

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _torch.sharded_groups(self.model):
            raise RematError(
                f"{type(self.model).__name__} is under fully_shard, which needs its blocks to stay modules: use "
                "remat.optimize_blocks(model, budget=...), or enable it with whole_model=False"
            )
        if self._step is None:
            self._twin = without_hooks(self.model)
            self._step = RematModule(self._twin, Rewriting(self.settings))
        with self._step._gate.call():
            imitate(self._twin, self.model)
        return self._step.forward(*args, **kwargs)


@_torch.not_compiled(_EAGER)
def uncompiled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called from compiled code, it stays out of that."""
    _say_uncompiled()
    return forward(*args, **kwargs)


@cache
def _say_uncompiled() -> None:
    log.warning("torch.compile met an enabled model, which stays within its budget: %s", _EAGER)


@cache
def _say_part(part: str, model: str) -> None:
    log.warning(
        "%s ran by itself in training, within no budget: remat is enabled for calls of %s, of which it is a part. Enable the "
        "part that is called instead; for trl's trainers, which do this, use remat.hf.RematCallback",
        part,
        model,
    )


def take_back(module: nn.Module, forward: Any) -> None:
    """Give a module its class's forward back, unless it has got another than ours."""
    if module.__dict__.get("forward") is forward:
        del module.__dict__["forward"]
