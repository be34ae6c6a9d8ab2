"""How to plan: the arguments of `optimize` and of its kin, and what the options of the backend share with them, checked when
given."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from remat.budget import BudgetLike, parse_budget, parse_host_budget
from remat.errors import RematError
from remat.op_times import check_costs
from remat.pins import Pins, check_pins
from remat.plan import Plan
from remat.policies import Policy, check_policy

log = logging.getLogger("remat")


@dataclass(frozen=True)
class Common:
    """What both doors take, as `remat.optimize` documents it."""

    budget: BudgetLike
    policy: Policy = "auto"
    trainable_only: bool = True
    host_budget: int | str | None = None
    pin: Pins = None
    costs: str = "analytic"

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        parse_host_budget(self.host_budget)
        check_policy(self.policy)
        check_pins(self.pin)
        check_costs(self.costs)
        if not isinstance(self.trainable_only, bool):
            raise RematError(f"trainable_only={self.trainable_only!r} is neither True nor False")


@dataclass(frozen=True)
class Settings(Common):
    """What door 1 takes. It is pickled without its optimizer and its loss."""

    plan: Plan | None = None
    optimizer: torch.optim.Optimizer | None = None
    in_flight: int = 1
    loss: Callable[[Any], torch.Tensor] | None = None
    holds_outputs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise RematError(f"plan={self.plan!r:.40} is no plan; remat.Plan.from_json reads the text of a file that has one")
        if self.optimizer is not None and not hasattr(self.optimizer, "param_groups"):
            raise RematError(f"optimizer={self.optimizer!r} is no optimizer; give the one that trains the model's parameters")
        if not isinstance(self.in_flight, int) or self.in_flight < 1:
            raise RematError(f"in_flight={self.in_flight!r} is not a number of forwards")
        if self.loss is not None and not callable(self.loss):
            raise RematError(f"loss={self.loss!r} cannot be called; give a function of the model's output")
        if not isinstance(self.holds_outputs, bool):
            raise RematError(f"holds_outputs={self.holds_outputs!r} is neither True nor False")

    def __getstate__(self) -> dict[str, Any]:
        if self.optimizer is not None:
            log.warning("what is pickled leaves out optimizer=: plans made from it do not count the optimizer's state")
        if self.loss is not None:
            log.warning("what is pickled leaves out loss=: plans made from it do not count what the loss takes")
        return {**self.__dict__, "optimizer": None, "loss": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return self


def read_settings(budget: BudgetLike, settings: Mapping[str, Any]) -> Settings:
    """Raises RematError for a setting that there is not."""
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "budget"]
    for name in settings:
        if name not in names:
            raise RematError(f"unknown setting {name!r}; there are {', '.join(names)}")
    return Settings(budget, **settings)
