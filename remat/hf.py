"""Hugging Face: a budget for a `transformers` model in place, by hand or as a callback of its Trainer.

    trainer = Trainer(model=model, args=args, callbacks=[RematCallback(budget="20GiB")], ...)

A model wrapped by PEFT is enabled on the model that it wraps, whatever kind of adapter it has. Needs transformers 5.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from remat.budget import BudgetLike
from remat.errors import RematError
from remat.inplace import disable_in_place, enable_in_place, enabled
from remat.plan import Plan
from remat.traced import Settings


def enable(model: nn.Module, budget: BudgetLike = "auto", **settings: Any) -> nn.Module:
    """Train `model` within `budget` from its next call on; returns the same model, of the same class and with the same keys.

    Args:
        model: a `PreTrainedModel`, one wrapped by PEFT, or any other module. Not yet prepared by accelerate or wrapped for
            several GPUs; that comes after.
        budget: as in `remat.optimize`.
        settings: further arguments of `remat.optimize`: policy, optimizer, host_budget, pin, costs, plan, trainable_only.

    The first call of each shape captures and plans, and so does the first one that adds to gradients. In `eval()` and without
    grad the model runs as it always did, `generate` included.

    Raises RematError where the model checkpoints already, or is enabled already. `CaptureError` and `BudgetError` come with the
    first call, before anything has run.
    """
    part = trained_part(model)
    _check_switches(model)
    enable_in_place(part, Settings(budget, **_known(settings)))
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo `enable`; returns the same model. Raises RematError where it is not enabled."""
    disable_in_place(trained_part(model))
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that an enabled model trains by: that of its latest kind of call, None before the first.

    Raises RematError where it is not enabled.
    """
    found = enabled(trained_part(model))
    if found is None:
        raise RematError(f"remat is not enabled for this {type(model).__name__}")
    return found.plan


def trained_part(model: nn.Module) -> nn.Module:
    """The module whose `forward` is a training step's: inside of a PEFT wrapper the model that it wraps."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


class RematCallback(TrainerCallback):
    """A budget for the model of a `Trainer` or `SFTTrainer`: `callbacks=[RematCallback(budget="20GiB")]`.

    Takes the arguments of `enable`. The optimizer's state counts as resident from the start of training. `plan` is the plan of
    the latest kind of batch. The model stays enabled after training; `remat.hf.disable(model)` undoes that.

    Raises RematError when the Trainer is made, where its arguments ask for another mechanism.
    """

    def __init__(self, budget: BudgetLike = "auto", **settings: Any) -> None:
        self._settings = Settings(budget, **_known(settings))
        self._model: nn.Module | None = None

    @property
    def plan(self) -> Plan | None:
        return None if self._model is None else plan_of(self._model)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before accelerate wraps the model's `forward`."""
        _check_arguments(args)
        model = kwargs["model"]
        _check_switches(model)
        enable_in_place(trained_part(model), self._settings)
        self._model = model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the optimizer's state, now that there is an optimizer."""
        _check_arguments(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self._model is None:
            raise RematError("RematCallback has to be among the callbacks= that the Trainer is made with; this one came later")
        found = enabled(trained_part(model))
        if model is not self._model or found is None:
            raise RematError("the Trainer's model is not the one that RematCallback enabled; make a new Trainer for it")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
        if isinstance(optimizer, torch.optim.Optimizer):
            found.replan(dataclasses.replace(self._settings, optimizer=optimizer))


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "budget"]
    for name in settings:
        if name not in names:
            raise RematError(f"unknown setting {name!r}; there are {', '.join(names)}")
    return settings


def _check_switches(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            off = next(n for n in ("activation", "gradient") if hasattr(model, f"{n}_checkpointing_disable") or n == "gradient")
            raise RematError(
                f"{name or type(module).__name__} checkpoints already, which remat replaces; call "
                f"model.{off}_checkpointing_disable() first"
            )


def _check_arguments(args: TrainingArguments) -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            raise RematError(f"TrainingArguments({name}=True) checkpoints already, which remat replaces; leave it out")
    if args.torch_compile:
        raise RematError(
            "TrainingArguments(torch_compile=True) compiles the model; leave out both it and RematCallback, and call "
            'model.compile(backend="remat", options={"budget": ...}) before the Trainer is made'
        )
