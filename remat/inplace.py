"""A budget for a model in place: the same object, class, keys and attributes, with another `forward` in training.

Trainers hold on to the model that they were given, save it by its class and look at the signature of its `forward`. So
`enable` puts a callable on the instance, as accelerate does for mixed precision; in `eval()` and without grad the class's own
`forward` runs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from remat.errors import RematError
from remat.module import RematModule
from remat.plan import Plan
from remat.traced import Settings


class Enabled:
    """The `forward` of an enabled model. `settings` say how to plan; `plan` is the plan of the latest kind of call."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.modules = list(model.modules())
        self._twin = object.__new__(type(model))
        self._twin.__dict__["training"] = True
        _imitate(self._twin, model)
        self.step = RematModule(self._twin, settings)
        self.is_on = True
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))

    @property
    def plan(self) -> Plan | None:
        return self.step.plan

    def replan(self, settings: Settings) -> None:
        """Plan by other settings from now on."""
        self.step = RematModule(self._twin, settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if not self.is_on or not model.training or not torch.is_grad_enabled():
            return type(model).forward(model, *args, **kwargs)
        if kwargs.get("use_cache"):
            raise RematError("use_cache=True: training keeps no key-value cache, which nothing there reads; leave it out")
        found = list(model.modules())
        if len(found) != len(self.modules) or any(a is not b for a, b in zip(found, self.modules, strict=True)):
            raise RematError(
                f"modules of {type(model).__name__} were added or replaced after remat was enabled for it; "
                "call remat.hf.disable(model) before, and enable it again after"
            )
        _imitate(self._twin, model)
        return self.step.forward(*args, **kwargs)


def enable_in_place(model: nn.Module, settings: Settings) -> Enabled:
    """Train `model` by a plan from its next call on, in place. Raises RematError when its `forward` is not its class's own."""
    if enabled(model) is not None:
        raise RematError(f"remat is enabled for this {type(model).__name__} already; call remat.hf.disable(model) first")
    if "forward" in model.__dict__:
        raise RematError(
            f"the forward of this {type(model).__name__} was replaced already (accelerate does so for mixed precision); "
            "enable remat before accelerator.prepare(model)"
        )
    if isinstance(model, RematModule):
        raise RematError("this module comes from remat.optimize and has a plan already")
    forward = Enabled(model, settings)
    model.__dict__["_remat"] = forward
    model.forward = forward
    return forward


def disable_in_place(model: nn.Module) -> None:
    """Give a model its own `forward` back, also where another was put around ours meanwhile."""
    forward = enabled(model)
    if forward is None:
        raise RematError(f"remat is not enabled for this {type(model).__name__}")
    forward.is_on = False
    del model.__dict__["_remat"]
    if model.__dict__.get("forward") is forward:
        del model.__dict__["forward"]


def enabled(model: nn.Module) -> Enabled | None:
    """What `enable_in_place` put on a model, None where it did not."""
    return model.__dict__.get("_remat")


def _imitate(twin: nn.Module, model: nn.Module) -> None:
    """Give `twin` the model's own parameters, buffers, submodules and attributes, but not our `forward`, nor the hooks, which
    the model itself runs."""
    for name, value in model.__dict__.items():
        if name not in ("forward", "_remat", "training"):
            is_hooks = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict)
            twin.__dict__[name] = type(value)() if is_hooks else value
