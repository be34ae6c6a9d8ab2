"""The callback in a Lightning Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import remat
from remat.lightning import RematCallback
from tests.models import mlp

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Module(pl.LightningModule):
    """Trains its one submodule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.x = mlp(rows=256)
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.net(self.x + batch.mean())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.arange(200.0), batch_size=2)  # type: ignore[arg-type]


class WithForward(Module):
    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self(self.x + batch.mean())
        self.losses.append(loss.item())
        return loss


class Two(Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


def fit(module: pl.LightningModule, folder: Path, *callbacks: pl.Callback, **arguments: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_epochs": 1, "accelerator": "cpu", "callbacks": [*callbacks], **quiet, **arguments}
    trainer = pl.Trainer(default_root_dir=str(folder), **given)
    torch.manual_seed(1)
    trainer.fit(module)
    return module


@pytest.mark.parametrize("kind", [Module, WithForward])
def test_a_loss_curve_is_the_plain_models(tmp_path: Path, kind: type[Module]) -> None:
    plain = fit(kind(), tmp_path)
    callback = RematCallback(budget=0.7)
    ours = fit(kind(), tmp_path, callback)
    assert callback.plan is not None
    assert callback.plan.dropped
    assert callback.plan.at_peak()["optimizer"] > 0
    assert len(ours.losses) == 100
    assert ours.losses == plain.losses


def test_gradients_accumulate_and_are_clipped(tmp_path: Path) -> None:
    arguments = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "limit_train_batches": 12}
    plain = fit(Module(), tmp_path, **arguments)
    assert fit(Module(), tmp_path, RematCallback(budget=0.8), **arguments).losses == plain.losses


def test_which_submodule_has_to_be_said(tmp_path: Path) -> None:
    with pytest.raises(remat.RematError, match="net, other"):
        fit(Two(), tmp_path, RematCallback())
    callback = RematCallback(budget=0.7, module="net")
    fit(Two(), tmp_path, callback, limit_train_batches=2)
    assert callback.plan is not None


def test_a_submodule_that_the_step_does_not_call_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(remat.RematError, match="did not call the forward of other"):
        fit(Two(), tmp_path, RematCallback(module="other"))


def test_a_budget_too_small_stops_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(remat.BudgetError):
        fit(Module(), tmp_path, RematCallback(budget=10_000))


def test_a_second_callback_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(remat.RematError, match="already"):
        fit(Module(), tmp_path, RematCallback(), RematCallback())


def test_a_callback_may_serve_one_module_after_the_other(tmp_path: Path) -> None:
    callback = RematCallback(budget=0.7)
    for module in (Module(), Module()):
        fit(module, tmp_path, callback, limit_train_batches=2)
        assert remat.plan_of(module.net) is callback.plan
    remat.disable(module.net)
    fit(module, tmp_path, callback, limit_train_batches=2)
    assert remat.plan_of(module.net) is callback.plan
