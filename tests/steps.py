"""One training step as the tests see it: loss, gradients, random state after it, and the memory it took."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import remat


@dataclass(frozen=True)
class Outcome:
    """What a step gave. `peak_bytes` is measured; gradients by the original's parameter names."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    rng: torch.Tensor
    output_type: type
    peak_bytes: int


def loss_of(output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own loss, or the inner product with its input, which gives the output a dense gradient."""
    if not isinstance(output, torch.Tensor):
        return output.loss
    return output if output.dim() == 0 else (output * next(iter(inputs.values()))).sum()


def run_step(model: Callable[..., Any], kwargs: dict[str, Any], disturb: bool = True) -> Outcome:
    """A warm-up step, then a measured one from the same seed, random numbers drawn between forward and backward.

    The warm-up's gradients are dropped. Buffers (batch-norm statistics) move twice; compare runs from equal state.
    """
    seen: dict[str, Any] = {}
    scratch = torch.empty(7)

    def step() -> None:
        output = model(**kwargs)
        seen["type"] = type(output)
        loss = loss_of(output, kwargs)
        seen["loss"] = loss.detach()
        if disturb:
            scratch.uniform_()
        loss.backward()

    assert isinstance(model, nn.Module)
    torch.manual_seed(1)
    step()
    model.zero_grad(set_to_none=True)
    seen.clear()
    gc.collect()  # modules of earlier tests, whose release would count in this step
    torch.manual_seed(1)
    measured = remat.measure(step)
    rng = torch.get_rng_state()
    gradients = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome(seen["loss"], gradients, rng, seen["type"], measured.peak_bytes)


def assert_same(a: Outcome, b: Outcome) -> None:
    """Loss, gradients and random state bitwise equal."""
    assert torch.equal(a.loss, b.loss), "the loss differs"
    assert_same_gradients(a.gradients, b.gradients)
    assert torch.equal(a.rng, b.rng), "the random state after the step differs"


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"gradients differ: {different}"


def assert_close_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float) -> None:
    """Each gradient within `relative` of the other's norm, or of a thousandth of the largest norm where it is tiny."""
    assert a.keys() == b.keys()
    floor = 1e-3 * max(float(g.norm()) for g in b.values())
    for name, gradient in a.items():
        error = float((gradient - b[name]).norm()) / max(float(b[name].norm()), floor)
        assert error <= relative, f"{name} is off by {error:.1e}"


def gradients_of(model: nn.Module, *args: Any, seed: int = 1, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of one plain step from a seed; the model's own are cleared."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss_of(model(*args, **kwargs), kwargs).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def cause(error: BaseException | None) -> remat.RematError:
    """The error of remat behind what Dynamo made of it."""
    while error is not None and not isinstance(error, remat.RematError):
        error = error.__cause__ or getattr(error, "inner_exception", None)
    assert error is not None, "no RematError behind it"
    return error


def refused(model: Any, *args: Any, **kwargs: Any) -> remat.RematError:
    with pytest.raises(Exception) as caught:  # noqa: PT011  Dynamo wraps what a backend raises
        model(*args, **kwargs)
    return cause(caught.value)
