"""Hugging Face: a budget for the model of a Trainer, as a callback.

    trainer = Trainer(model=model, args=args, callbacks=[RematCallback(budget="20GiB")], ...)

`enable`, `disable` and `plan_of` do it by hand, for any module. Needs transformers 5.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from remat.budget import BudgetLike
from remat.errors import RematError
from remat.inplace import disable, enable, enable_by, enabled, plan_of, read_settings
from remat.plan import Plan

__all__ = ["RematCallback", "disable", "enable", "plan_of"]


class RematCallback(TrainerCallback):
    """A budget for the model of a `Trainer` or `SFTTrainer`: `callbacks=[RematCallback(budget="20GiB")]`.

    Takes the arguments of `remat.enable`. The optimizer's state counts as resident from the start of training. `plan` is the
    plan of the latest kind of batch. The model stays enabled after training; `remat.disable(model)` undoes that.

    Raises RematError when the Trainer is made, where its arguments ask for another mechanism.
    """

    def __init__(self, budget: BudgetLike = "auto", **settings: Any) -> None:
        self._settings = read_settings(budget, settings)
        self._model: nn.Module | None = None

    @property
    def plan(self) -> Plan | None:
        return None if self._model is None else plan_of(self._model)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before accelerate wraps the model's `forward`."""
        _check_arguments(args)
        enable_by(kwargs["model"], self._settings)
        self._model = kwargs["model"]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the optimizer's state, now that there is an optimizer."""
        _check_arguments(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self._model is None:
            raise RematError("RematCallback has to be among the callbacks= that the Trainer is made with; this one came later")
        found = enabled(model)
        if model is not self._model or found is None:
            raise RematError("the Trainer's model is not the one that RematCallback enabled; make a new Trainer for it")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
        if isinstance(optimizer, torch.optim.Optimizer):
            found.replan(dataclasses.replace(self._settings, optimizer=optimizer))


def _check_arguments(args: TrainingArguments) -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            raise RematError(f"TrainingArguments({name}=True) checkpoints already, which remat replaces; leave it out")
    if args.torch_compile:
        raise RematError(
            "TrainingArguments(torch_compile=True) compiles the model; leave out both it and RematCallback, and call "
            'model.compile(backend="remat", options={"budget": ...}) before the Trainer is made'
        )
