"""Lightning: a budget for the model of a `LightningModule`, as a callback of its Trainer.

trainer = lightning.Trainer(callbacks=[RematCallback(budget="20GiB")])
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from remat.budget import BudgetLike
from remat.errors import RematError
from remat.inplace import enable_by, enabled, plan_of
from remat.plan import Plan
from remat.settings import read_settings


class RematCallback(Callback):
    """A budget for what `training_step` runs: the module's own `forward` where it has one, otherwise its one submodule.

    module: the submodule to plan for, by name ("net.encoder"), where there are several. Other arguments are those of
    `remat.enable`. With one optimizer, its state counts as resident. `plan` is the plan of the latest kind of batch.

    Raises RematError where it is not clear what to plan for, and after the first batch if training_step did not call it.
    """

    def __init__(self, budget: BudgetLike = "auto", *, module: str = "", whole_model: bool = True, **settings: Any) -> None:
        self._settings, self._name, self._whole = read_settings(budget, settings), module, whole_model
        self._model: nn.Module | None = None

    @property
    def plan(self) -> Plan | None:
        return None if self._model is None else plan_of(self._model)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the strategy wraps the module."""
        model = self._chosen(pl_module) if stage == "fit" else self._model
        if model is not None and (model is not self._model or enabled(model) is None):
            enable_by(model, self._settings, self._whole)
            self._model = model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the optimizer's state, now that there is an optimizer."""
        if self._model is not None and len(trainer.optimizers) == 1:
            found = enabled(self._model)
            assert found is not None, "setup enables the model"
            found.replan(dataclasses.replace(self._settings, optimizer=trainer.optimizers[0]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Says so when there was nothing to plan."""
        if self.plan is None:
            raise RematError(
                f"training_step of {type(pl_module).__name__} did not call the forward of {self._name or 'the module'}; "
                'name the submodule that it calls: RematCallback(module="...")'
            )

    def _chosen(self, pl_module: LightningModule) -> nn.Module:
        if self._name:
            return pl_module.get_submodule(self._name)
        if type(pl_module).forward is not LightningModule.forward:
            return pl_module
        trained = {
            name: child for name, child in pl_module.named_children() if any(p.requires_grad for p in child.parameters())
        }
        if len(trained) != 1:
            raise RematError(
                f"{type(pl_module).__name__} has no forward of its own, and trains {', '.join(trained) or 'nothing'}; "
                'say which to plan for: RematCallback(module="...")'
            )
        return next(iter(trained.values()))
