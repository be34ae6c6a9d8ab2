"""A budget for a model in place: the same object, class, keys and attributes, with another `forward` in training.

Trainers hold on to the model that they were given, save it by its class and look at the signature of its `forward`. So
`enable` puts a callable on the instance, as accelerate does for mixed precision; in `eval()` and without grad the class's own
`forward` runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from remat.blocks import find_blocks
from remat.budget import BudgetLike
from remat.capture import check_inputs
from remat.enabled import Enabled, EnabledWhole
from remat.enabled_blocks import EnabledBlocks
from remat.errors import RematError
from remat.module import RematModule
from remat.plan import Plan
from remat.settings import Settings, read_settings

log = logging.getLogger("remat")


def enable(model: nn.Module, budget: BudgetLike = "auto", *, whole_model: bool = True, **settings: Any) -> nn.Module:
    """Train `model` within `budget` from its next call on; returns the same model, of the same class and with the same keys.

    Args:
        model: a `PreTrainedModel`, one wrapped by PEFT (it is enabled on the model inside), or any other module. Not yet
            prepared by accelerate or wrapped for several GPUs; that comes after.
        budget: as in `remat.optimize`.
        whole_model: False rewrites the model block by block, as `optimize_blocks` does, where one graph cannot hold it.
        **settings: further arguments of `remat.optimize`: policy, optimizer, host_budget, pin, costs, plan, trainable_only,
            in_flight, loss, holds_outputs.

    The first call of each shape captures and plans, and the first one that adds to gradients plans again. In `eval()` and
    without grad the model runs as it always did, `generate` included.

    Raises RematError where the model checkpoints already, or is enabled already. `CaptureError` and `BudgetError` come with the
    first call, before anything has run.
    """
    enable_by(model, read_settings(budget, settings), whole_model)
    return model


def enable_by(model: nn.Module, settings: Settings, whole_model: bool = True) -> Enabled:
    """`enable` by settings; returns what the model's `forward` is then."""
    part = _checked(model)
    if not whole_model:
        return _enable_blocks(part, settings, None)
    forward = EnabledWhole(part, settings)
    forward.install()
    return forward


def optimize_blocks(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike,
    blocks: Sequence[nn.Module | str] | None = None,
    **settings: Any,
) -> nn.Module:
    """Train `model` within `budget` with every block kept as a module; returns the same model, as `enable` does.

    For `fully_shard`, before or after it is applied, and for models that one graph cannot hold: each block is captured on its
    own, and the code between them runs as it is. One plan covers the step, with what lies between blocks, and with what
    `fully_shard` gathers and reduces, in its timeline; this rank's part of parameters, gradients and optimizer state is
    resident. What goes from one block to another is saved; nothing moves to the host.

    Args:
        model: as in `enable`.
        args: example inputs of one call, as given by position, to plan now. Without inputs each kind of call is planned when it
            first comes. Where `fully_shard` has been applied, all ranks plan together, and an error on one is raised on all.
        kwargs: those given by name.
        budget: as in `remat.optimize`.
        blocks: modules of the model or their paths, none inside of another; by default the elements of its outermost lists of
            modules.
        **settings: further arguments of `remat.optimize`: policy ("auto", "none", "blocks", "every-k", "selective" or a
            function), optimizer, pin, costs, plan, trainable_only, in_flight, loss.

    Raises RematError where `enable` does, and for a setting that has no meaning here.
    """
    check_inputs(args, kwargs)
    forward = _enable_blocks(_checked(model), read_settings(budget, settings), blocks)
    if args or kwargs:
        try:
            forward.capture_together(args, kwargs or {})
        except BaseException:
            forward.remove()
            raise
    return model


def _enable_blocks(model: nn.Module, settings: Settings, blocks: Sequence[nn.Module | str] | None) -> EnabledBlocks:
    scripted = next((path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise RematError(f"{scripted} is a module of torch.jit, which remat takes in a whole model, not block by block")
    found = find_blocks(model) if blocks is None else _named(model, blocks)
    for path, block in found.items():
        if "forward" in block.__dict__:
            raise RematError(f"the forward of {path} was replaced already; enable remat before that")
    forward = EnabledBlocks(model, settings, tuple(found))
    forward.install()
    return forward


def _named(model: nn.Module, blocks: Sequence[nn.Module | str]) -> dict[str, nn.Module]:
    if isinstance(blocks, str) or not blocks:
        raise RematError(f"blocks={blocks!r} is no list of blocks; left out, those of the model's outermost lists are meant")
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    found: dict[str, nn.Module] = {}
    for block in blocks:
        path = block if isinstance(block, str) else paths.get(id(block))
        if not path or path not in modules:
            shown = repr(block) if isinstance(block, str) else type(block).__name__
            raise RematError(f"blocks=: {shown} is not a module inside of {type(model).__name__}")
        found[path] = modules[path]
    for path in found:
        outer = next((other for other in found if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise RematError(f"blocks=: {path} lies inside of {outer}")
    return found


def _checked(model: nn.Module) -> nn.Module:
    """The part of a model to enable. Raises RematError where it cannot be."""
    if not isinstance(model, nn.Module):
        raise RematError(f"a {type(model).__name__} is no nn.Module; give the model itself")
    wrapper, model = model, trained_part(model)
    name = type(model).__name__
    tuner = getattr(wrapper, "base_model", model) if wrapper is not model else model
    if tuner is not model and "forward" in vars(type(tuner)):  # AdaLoRA adds to the loss there
        said = "%s runs code of its own around %s, which alone is planned for: leave room for what that takes"
        log.warning(said, type(tuner).__name__, name)
    if enabled(model) is not None:
        raise RematError(f"remat is enabled for this {name} already; call remat.disable(model) first")
    if isinstance(model, RematModule):
        raise RematError("this module comes from remat.optimize and has a plan already")
    if "forward" in model.__dict__:
        raise RematError(
            f"the forward of this {name} was replaced already (accelerate does so for mixed precision, trl for its loss); "
            "enable remat before accelerator.prepare(model); for trl's trainers use remat.hf.RematCallback"
        )
    _check_switches(model)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo `enable`, also where another `forward` was put around ours meanwhile; returns the same model.

    Raises RematError where it is not enabled.
    """
    _found(model).remove()
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that an enabled model, or one that `optimize` returned, trains by: that of its latest kind of call, None before
    the first.

    Raises RematError for another model.
    """
    if isinstance(model, RematModule):
        return model.plan
    forward = enabled(model)
    if forward is None:
        raise RematError(
            f"this {type(model).__name__} is neither from remat.optimize nor under remat.enable; of one that was compiled "
            "remat.plans has the plans"
        )
    return forward.plan


def trained_part(model: nn.Module) -> nn.Module:
    """The module whose `forward` is a training step's: inside of a PEFT wrapper the model that it wraps."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def enabled(model: nn.Module) -> Enabled | None:
    """The `forward` that `enable` gave a model, None where it did not."""
    return trained_part(model).__dict__.get("_remat")


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
