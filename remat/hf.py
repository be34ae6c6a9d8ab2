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
from remat.enabled import Enabled
from remat.errors import RematError
from remat.inplace import disable, enable, enable_by, plan_of
from remat.plan import Plan
from remat.settings import read_settings

__all__ = ["RematCallback", "disable", "enable", "plan_of"]


class RematCallback(TrainerCallback):
    """A budget for the model of a `Trainer` or `SFTTrainer`: `callbacks=[RematCallback(budget="20GiB")]`.

    Takes the arguments of `remat.enable`. The optimizer's state counts as resident from the start of training. Outputs beside
    the loss take nothing in backward, since a Trainer lets go of them before (`holds_outputs=True` for one that does not).
    `plan` is the plan of the latest kind of batch. The model stays enabled after training; `remat.disable(model)` undoes that.

    A trainer that calls the model's backbone and computes the loss itself (trl's do) gets a budget for the backbone; the loss
    is outside of the plan then, so leave room for it, or say with `loss=` what it is.

    Raises RematError when the Trainer is made, where its arguments ask for another mechanism.
    """

    def __init__(self, budget: BudgetLike = "auto", *, whole_model: bool = True, **settings: Any) -> None:
        self._settings = read_settings(budget, {"holds_outputs": False, **settings})
        self._whole = whole_model
        self._model: nn.Module | None = None
        self._forward: Enabled | None = None

    @property
    def plan(self) -> Plan | None:
        return None if self._forward is None else self._forward.plan

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before accelerate wraps the model's `forward`."""
        _check_arguments(args)
        self._forward = enable_by(kwargs["model"], self._settings, self._whole)
        self._model = kwargs["model"]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the optimizer's state, now that there is an optimizer."""
        _check_arguments(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self._model is None or self._forward is None:
            raise RematError("RematCallback has to be among the callbacks= that the Trainer is made with; this one came later")
        if model is not self._model or not self._forward.is_on:
            raise RematError("the Trainer's model is not the one that RematCallback enabled; make a new Trainer for it")
        whole = self._forward.model
        backbone = getattr(whole, "base_model", whole)
        if not _leads_to(whole.forward, self._forward) and backbone is not whole:
            disable(whole)
            self._forward = enable_by(backbone, self._settings, self._whole)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
        if isinstance(optimizer, torch.optim.Optimizer):
            self._forward.replan(dataclasses.replace(self._settings, optimizer=optimizer))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Says so when there was nothing to plan."""
        if self._forward is not None and self.plan is None:
            raise RematError(f"the Trainer's step did not call the forward of {type(self._forward.model).__name__}")


def _leads_to(forward: Any, ours: Enabled) -> bool:
    """True where a `forward` is ours, or wraps it."""
    while forward is not None and forward is not ours:
        forward = getattr(forward, "__wrapped__", None)
    return forward is ours


def _check_arguments(args: TrainingArguments) -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            raise RematError(
                f"{type(args).__name__}({name}=True) checkpoints already, which remat replaces; set it to False "
                "(trl's configurations have it on unless told otherwise)"
            )
    if args.n_gpu > 1:
        raise RematError(
            f"with {args.n_gpu} GPUs in one process the Trainer uses nn.DataParallel, whose replicas would all run this model; "
            "start a process for each GPU (torchrun, accelerate launch), or make one visible"
        )
    if args.torch_compile:
        raise RematError(
            f"{type(args).__name__}(torch_compile=True) compiles the model; leave out both it and RematCallback, and call "
            'model.compile(backend="remat", options={"budget": ...}) before the Trainer is made'
        )
