"""A budget for a model in place: the same object, class, keys and attributes, with another `forward` in training.

Trainers hold on to the model that they were given, save it by its class and look at the signature of its `forward`. So
`enable` puts a callable on the instance, as accelerate does for mixed precision; in `eval()` and without grad the class's own
`forward` runs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from remat.budget import BudgetLike
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
                "call remat.disable(model) before, and enable it again after"
            )
        _imitate(self._twin, model)
        return self.step.forward(*args, **kwargs)


def enable(model: nn.Module, budget: BudgetLike = "auto", **settings: Any) -> nn.Module:
    """Train `model` within `budget` from its next call on; returns the same model, of the same class and with the same keys.

    Args:
        model: a `PreTrainedModel`, one wrapped by PEFT (it is enabled on the model inside), or any other module. Not yet
            prepared by accelerate or wrapped for several GPUs; that comes after.
        budget: as in `remat.optimize`.
        **settings: further arguments of `remat.optimize`: policy, optimizer, host_budget, pin, costs, plan, trainable_only.

    The first call of each shape captures and plans, and the first one that adds to gradients plans again. In `eval()` and
    without grad the model runs as it always did, `generate` included.

    Raises RematError where the model checkpoints already, or is enabled already. `CaptureError` and `BudgetError` come with the
    first call, before anything has run.
    """
    enable_by(model, read_settings(budget, settings))
    return model


def enable_by(model: nn.Module, settings: Settings) -> Enabled:
    """`enable` by settings; returns what the model's `forward` is then."""
    model = trained_part(model)
    name = type(model).__name__
    if enabled(model) is not None:
        raise RematError(f"remat is enabled for this {name} already; call remat.disable(model) first")
    if isinstance(model, RematModule):
        raise RematError("this module comes from remat.optimize and has a plan already")
    if "forward" in model.__dict__:
        raise RematError(
            f"the forward of this {name} was replaced already (accelerate does so for mixed precision); "
            "enable remat before accelerator.prepare(model)"
        )
    _check_switches(model)
    forward = Enabled(model, settings)
    model.__dict__["_remat"] = forward
    model.forward = forward
    return forward


def disable(model: nn.Module) -> nn.Module:
    """Undo `enable`, also where another `forward` was put around ours meanwhile; returns the same model.

    Raises RematError where it is not enabled.
    """
    part, forward = trained_part(model), _found(model)
    forward.is_on = False
    del part.__dict__["_remat"]
    if part.__dict__.get("forward") is forward:
        del part.__dict__["forward"]
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that an enabled model trains by: that of its latest kind of call, None before the first.

    Raises RematError where it is not enabled.
    """
    return _found(model).plan


def trained_part(model: nn.Module) -> nn.Module:
    """The module whose `forward` is a training step's: inside of a PEFT wrapper the model that it wraps."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def enabled(model: nn.Module) -> Enabled | None:
    """The `forward` that `enable` gave a model, None where it did not."""
    return trained_part(model).__dict__.get("_remat")


def read_settings(budget: BudgetLike, settings: Mapping[str, Any]) -> Settings:
    """Raises RematError for a setting that there is not."""
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "budget"]
    for name in settings:
        if name not in names:
            raise RematError(f"unknown setting {name!r}; there are {', '.join(names)}")
    return Settings(budget, **settings)


def _found(model: nn.Module) -> Enabled:
    found = enabled(model)
    if found is None:
        raise RematError(f"remat is not enabled for this {type(model).__name__}")
    return found


def _check_switches(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            kind = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
            raise RematError(
                f"{name or type(module).__name__} checkpoints already, which remat replaces; call "
                f"model.{kind}_checkpointing_disable() first"
            )


def _imitate(twin: nn.Module, model: nn.Module) -> None:
    """Give `twin` the model's own parameters, buffers, submodules and attributes, but not our `forward`, nor the hooks, which
    the model itself runs."""
    for name, value in model.__dict__.items():
        if name not in ("forward", "_remat", "training"):
            is_hooks = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict)
            twin.__dict__[name] = type(value)() if is_hooks else value
