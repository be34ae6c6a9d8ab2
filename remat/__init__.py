"""remat: training that fits in memory. A budget in bytes, and a rewritten step that stays inside it.

The public names, on one screen:

    optimize    rewrite a module for a budget (door 1)        plans     plans and graphs of a compiled model (door 2)
    plan        what would be done, without doing it          measure   what a step really allocated
    frontier    the trade-off, from fastest to smallest       explain   what is saved, recomputed, and why
    fit         the largest batch or sequence for a budget
    verify      a step beside its plan                       report    all that a bug report needs, in one file
    enable      a budget for a model in place (door 1); disable, plan_of
    optimize_blocks   the same with every block kept as a module, for fully_shard
    prepare_for_training   the same and what else fine-tuning needs, with the way back
    to_dot      a rewritten graph for Graphviz
    profile_device   measure this machine's rates, once; plans use them from then on
"""

import importlib
import types

from remat.api import explain, frontier, optimize, plan
from remat.backend import plans
from remat.bundle import report
from remat.devices import DeviceProfile, profile_device
from remat.errors import BudgetError, CaptureError, HostBudgetError, RematError, RewriteError
from remat.fit import Fit, fit
from remat.inplace import disable, enable, optimize_blocks, plan_of
from remat.measure import Measurement, measure
from remat.plan import Activation, Block, Formula, Plan, Transfer
from remat.prepare import Preparation, prepare_for_training
from remat.program import Decision
from remat.session import CompiledPlan
from remat.verify import Check, Verification, verify
from remat.views.dot import to_dot

_INTEGRATIONS = ("distributed", "hf", "lightning")  # imported when they are named: they need what is no dependency


def __getattr__(name: str) -> types.ModuleType:
    if name in _INTEGRATIONS:
        try:
            return importlib.import_module(f"remat.{name}")
        except ModuleNotFoundError as error:
            raise AttributeError(f"remat.{name} cannot be imported: {error} (pip install 'remat[{name}]')") from error
    raise AttributeError(f"module 'remat' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Block",
    "BudgetError",
    "CaptureError",
    "Check",
    "CompiledPlan",
    "Decision",
    "DeviceProfile",
    "Fit",
    "Formula",
    "HostBudgetError",
    "Measurement",
    "Plan",
    "Preparation",
    "RematError",
    "RewriteError",
    "Transfer",
    "Verification",
    "disable",
    "enable",
    "explain",
    "fit",
    "frontier",
    "measure",
    "optimize",
    "optimize_blocks",
    "plan",
    "plan_of",
    "plans",
    "prepare_for_training",
    "profile_device",
    "report",
    "to_dot",
    "verify",
]
