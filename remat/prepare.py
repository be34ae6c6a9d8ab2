"""A language model made ready for training, as LLaMA-Factory and Unsloth do it, and undone again.

What is done is little: norms in float32 and logits in float32 where asked for, no key-value cache, and a plan in the place of
checkpointing. Inputs are left as they are. Checkpointing needs inputs that require grad when the embedding is frozen, and makes
autograd keep what a frozen model's lower layers need; a plan needs neither.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from remat.budget import BudgetLike
from remat.errors import RematError
from remat.inplace import disable, enable, trained_part
from remat.policies import Policy

log = logging.getLogger("remat")

_HALF = (torch.float16, torch.bfloat16)

UNSLOTH: dict[bool | str, Policy] = {"unsloth": "offload", True: "blocks", False: "none"}
"""The policy for each value of Unsloth's `use_gradient_checkpointing`."""


@dataclass
class Preparation:
    """What was done to a model, a line each, and the way back."""

    model: nn.Module
    done: tuple[str, ...] = ()
    _back: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    def undo(self) -> nn.Module:
        """Put everything back, the last first; weights keep what they have learned. Returns the model."""
        while self._back:
            self._back.pop()()
        return self.model

    def note(self, what: str, *back: Callable[[], Any]) -> None:
        self.done = (*self.done, what)
        self._back += back

    def __str__(self) -> str:
        return "\n".join(self.done)


def prepare_for_training(
    model: nn.Module,
    *,
    upcast_layernorm: bool = False,
    upcast_lm_head_output: bool = False,
    use_cache: bool = False,
    budget: BudgetLike = "auto",
    policy: Policy = "auto",
    use_gradient_checkpointing: bool | str | None = None,
    trainable_only: bool = True,
    **settings: Any,
) -> Preparation:
    """Make a `transformers` model ready for training, in place.

    Args:
        model: a `PreTrainedModel`, or one wrapped by PEFT.
        upcast_layernorm: norms keep their weights and compute in float32; what they return has the dtype of what they got.
        upcast_lm_head_output: logits are float32.
        use_cache: leave the key-value cache of the model's configuration as it is. Training steps never keep one.
        budget: as in `remat.optimize`.
        policy: as in `remat.optimize`.
        use_gradient_checkpointing: Unsloth's argument in the place of `policy`: "unsloth" is "offload" (blocks' inputs wait on
            the host), True is "blocks", False is "none" (save everything). The budget is then checked and changes nothing.
        trainable_only: as in `remat.optimize`.
        **settings: further arguments of `remat.optimize`.

    Raises RematError for arguments that contradict each other, and where the model checkpoints already or is enabled already;
    nothing has been done then.
    """
    if use_gradient_checkpointing is not None:
        if policy != "auto":
            raise RematError("policy= and use_gradient_checkpointing= say the same in two ways; give one of them")
        if use_gradient_checkpointing not in UNSLOTH:
            raise RematError(f"use_gradient_checkpointing={use_gradient_checkpointing!r}; there are 'unsloth', True and False")
        policy = UNSLOTH[use_gradient_checkpointing]
    part = trained_part(model)
    embeddings: Any = getattr(part, "get_output_embeddings", None)
    head: Any = embeddings() if embeddings is not None else None
    if upcast_lm_head_output and head is None:
        raise RematError(f"upcast_lm_head_output=True: {type(part).__name__} has no output embeddings")
    enable(model, budget, policy=policy, trainable_only=trainable_only, **settings)
    found = Preparation(model)
    found.note(f"remat: policy {policy!r}, budget {budget!r}", functools.partial(disable, model))
    if upcast_layernorm:
        _upcast_norms(part, found)
    if upcast_lm_head_output:
        found.note("logits are float32", head.register_forward_hook(_in_float).remove)
    config: Any = getattr(part, "config", None)
    if not use_cache and getattr(config, "use_cache", None) is True:
        log.info("%s: use_cache is off, since training reads no key-value cache", type(part).__name__)
        config.use_cache = False
        found.note("use_cache is off", functools.partial(setattr, config, "use_cache", True))
    found.note("inputs are left as they are: a plan needs no gradient of theirs")
    return found


def _upcast_norms(model: nn.Module, found: Preparation) -> None:
    norms = [module for module in model.modules() if _is_norm(module)]
    back: list[Callable[[], Any]] = []
    for norm in norms:
        parameters = list(norm.parameters(recurse=False))
        dtype = parameters[0].dtype
        back += [functools.partial(_recast, parameter, dtype) for parameter in parameters]
        for parameter in parameters:
            _recast(parameter, torch.float32)
        back.append(norm.register_forward_pre_hook(_with_float_inputs).remove)
        back.append(norm.register_forward_hook(functools.partial(_with_output_in, dtype)).remove)
    found.note(f"{len(norms)} norms compute in float32", *back)


def _is_norm(module: nn.Module) -> bool:
    """A norm with weights of a smaller type than float32."""
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.dim() == 1 and p.dtype in _HALF for p in own)


def _recast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Change a parameter's dtype in place, and its gradient's."""
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    if gradient is not None:
        parameter.grad = gradient.to(dtype)


def _with_float_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALF else a for a in args)


def _with_output_in(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


def _in_float(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.float()
