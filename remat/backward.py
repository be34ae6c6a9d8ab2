"""Backward of a recorded step: the loss that it begins from, and its run on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from remat import _torch
from remat.errors import CaptureError, RematError
from remat.export import DOOR_2
from remat.recorder import Recorder
from remat.settings import Settings


def loss_from(output: Any, recorder: Recorder, settings: Settings) -> tuple[torch.Tensor, Any]:
    """The loss, and what the loop holds until the step ends: the output, or the loss alone where the settings say so.

    The loss is what `loss=` makes of the output; without it, what is named `loss` there, or a scalar that all else has led to;
    or else some loss outside of the model, which gives each tensor that requires grad a dense gradient, and may hold them all.
    """
    if settings.loss is not None:
        loss = _computed_loss(output, recorder, settings.loss)
        return loss, output if settings.holds_outputs else loss
    own = own_loss(output)
    if own is None:
        return _unknown_loss(output), output
    return own, output if settings.holds_outputs else own


def own_loss(output: Any) -> torch.Tensor | None:
    """The loss that a model returns, if it does."""
    differentiable = _differentiable(output)
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = (o for o in differentiable if o.dim() == 0 and (o is named or _is_after(o, differentiable)))
    return next(found, None)


def run_backward(loss: torch.Tensor, recorder: Recorder) -> None:
    """Raises CaptureError where an op on the way has no derivative."""
    recorder.watch_sums(loss)
    try:
        with _torch.without_autocast(), _fake_gradients(loss, recorder):
            loss.backward()
    except RematError:
        raise
    except Exception as error:  # an op without a derivative; of any kind where a function of the model's own runs
        raise CaptureError(f"there is no backward to plan for: {error}; {DOOR_2}") from error


@contextlib.contextmanager
def _fake_gradients(loss: Any, recorder: Recorder) -> Iterator[None]:
    """Parameters with values, which a loss outside of the model trains, have fake gradients meanwhile."""
    leaves = (node.variable for node in _torch.autograd_nodes(loss) if _torch.is_leaf_node(node))
    real = [leaf for leaf in leaves if not _torch.is_fake(leaf)]
    before = [leaf.grad for leaf in real]
    try:
        for leaf in real:
            if leaf.grad is not None:
                recorder.found.append(leaf.grad)
                with _torch.no_dispatch_modes(), loss.fake_mode:  # no memory of the step
                    leaf.grad = _torch.fake_like(leaf.grad)
                recorder.know(leaf.grad)
        yield
    finally:
        for leaf, gradient in zip(real, before, strict=True):
            leaf.grad = gradient


def _computed_loss(output: Any, recorder: Recorder, loss_of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """`loss_of` runs between forward and backward, as part of which it counts: no plan decides about it."""
    try:
        loss = recorder.run_loss(lambda: loss_of(output))
    except (_torch.DataDependentOutputException, _torch.DynamicOutputShapeException) as error:
        raise RematError(
            f"{_LOSS_FAILS}: {error.func} reads them (what a mask picks has no size there: weigh by it, or use ignore_index)"
        ) from error
    except Exception as error:  # of any kind: it is the user's
        raise RematError(f"{_LOSS_FAILS}: {error}") from error
    if not _torch.is_fake(loss) or loss.numel() != 1 or not loss.requires_grad:
        raise RematError("loss= has to make of the output a tensor of one number that requires grad")
    if any(_torch.is_numbered_before(node, recorder.first) for node in _torch.autograd_nodes(loss)):
        raise RematError("loss= reads a result whose graph was made before, which planning would run backward; detach it there")
    recorder.found[:] = [tensor for tensor in recorder.found if tensor.device == loss.device]
    return loss


_LOSS_FAILS = "loss= fails on the model's output, which has no values while planning"


def _differentiable(output: Any) -> list[torch.Tensor]:
    leaves = (leaf for leaf in _torch.pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return [tensor for tensor in leaves if tensor.requires_grad]


def _is_after(loss: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether backward from `loss` passes through all `others`."""
    nodes = _torch.autograd_nodes(loss)
    return all(other is loss or other.grad_fn in nodes for other in others)


def _unknown_loss(output: Any) -> torch.Tensor:
    differentiable = _differentiable(output)
    if not differentiable:
        has_any = any(isinstance(leaf, torch.Tensor) for leaf in _torch.pytree.tree_leaves(output))
        raise CaptureError(
            f"{'nothing requires grad' if has_any else 'no tensor is found'} in the {type(output).__name__} that the model "
            "returns, so that there is no backward to plan for"
        )
    return _Loss.apply(*differentiable)


class _Loss(torch.autograd.Function):
    """Some loss outside of the model: it gives each output a dense gradient, which the engine lets go of after use."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(o.shape, o.dtype, o.device) for o in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
