"""`fully_shard` as a step on fake tensors sees it: when each group of parameters is gathered and let go of, and where its
gradients go.

It follows FSDP2 (torch.distributed.fsdp), whose hooks this imitates on a model's twin. A group gathers into one buffer and
copies out of it; in forward the buffer stays until the next group has gathered, in backward the next group gathers ahead.
When a group's gradients are there, they are copied into a buffer that stays until the next group's are reduced, and what
is left of them is this rank's share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from remat._torch import ShardedGroup, pytree
from remat.recorder import Recorder
from remat.twin import Twin

_LATE = 2  # buffers of gloo's threads that are not let go of yet; measured at most two, and not always


def local_parameters(model: nn.Module, groups: Sequence[ShardedGroup]) -> list[torch.Tensor]:
    """What this rank has of a model's parameters, and of their gradients: leaves, each once."""
    found: dict[int, torch.Tensor] = {}
    sharded = {(id(m), name): p.shard for group in groups for p in group.parameters for m, name in p.places}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            tensor = sharded.get((id(module), name), parameter)
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


class ShardedStep:
    """One step of a twin under `fully_shard`; a recorder is told what the buffers are for."""

    def __init__(self, twin: Twin, groups: Sequence[ShardedGroup], recorder: Recorder) -> None:
        self._recorder = recorder
        self._gathers = [_Group(self, twin, group) for group in groups]
        self.gathered: torch.Tensor | None = None  # forward's last buffer
        self.reduced: torch.Tensor | None = None  # backward's last buffer
        self._late: deque[torch.Tensor] = deque(maxlen=_LATE)
        self.order: list[_Group] = []  # of forward

    def collective(self, elements: int, like: torch.Tensor, dtype: torch.dtype, kind: str) -> torch.Tensor:
        """The buffer of a collective, beside which gloo has one of its own."""
        if like.device.type == "cpu":
            self._late.append(self.buffer(elements, like, dtype, "working set"))
        return self.buffer(elements, like, dtype, kind)

    def end_forward(self) -> None:
        """The outermost forward is over."""
        self.gathered = None

    def end_backward(self) -> None:
        """Gradients that no input's gradient waited for are reduced now."""
        for group in self._gathers:
            group.reduce()
        self.reduced = None
        self._late.clear()

    def buffer(self, elements: int, like: torch.Tensor, dtype: torch.dtype, kind: str) -> torch.Tensor:
        """Memory that the recorder counts as of this kind."""
        made = torch.empty(elements, dtype=dtype, device=like.device)
        for storage in self._recorder.behind(made):
            storage.kind = kind
        return made


class _Group:
    """A group of parameters in the twin's step."""

    def __init__(self, step: ShardedStep, twin: Twin, group: ShardedGroup) -> None:
        self._step = step
        self._group = group
        self._parameters = [twin.parameter(found) for found in group.parameters]
        self._whole: list[torch.Tensor] = []
        self._ahead: torch.Tensor | None = None
        self._share: torch.Tensor | None = None
        module = twin.of(group.module)
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = _cast(args, self._group.input_dtype), _cast(kwargs, self._group.input_dtype)
        buffer = self._gather()
        self._step.gathered = None
        self._copy_out()
        self._step.gathered = buffer
        self._step.order.append(self)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if places:
            for i, leaf in zip(places, _Reduces.apply(self, *(leaves[i] for i in places)), strict=True):
                leaves[i] = leaf
        again: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
        return again

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if self._group.reshards:
            self._whole = []
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(self._before_backward)
        return _cast(output, self._group.output_dtype)

    def _before_backward(self, _: torch.Tensor) -> None:
        if not self._whole:
            buffer, self._ahead = self._ahead if self._ahead is not None else self._gather(), None
            self._copy_out()
            del buffer
        earlier = self._step.order[: self._step.order.index(self)] if self in self._step.order else []
        if earlier and not earlier[-1]._whole and earlier[-1]._ahead is None:
            earlier[-1]._ahead = earlier[-1]._gather()

    def _gather(self) -> torch.Tensor:
        first = self._parameters[0]
        return self._step.collective(sum(p.numel() for p in self._parameters), first, first.dtype, "parameters")

    def _copy_out(self) -> None:
        self._whole = [self._step.buffer(p.numel(), p, p.dtype, "parameters") for p in self._parameters]

    def reduce(self) -> None:
        """After its backward: reduce its gradients to this rank's share, and let go of its parameters."""
        done = [p for p in self._parameters if p.grad is not None]
        self._whole, self._step.reduced = [], None
        if not done:
            return
        elements = sum(p.numel() for p in done)
        dtype = self._group.reduce_dtype or done[0].dtype
        self._step.reduced = self._step.collective(elements, done[0], dtype, "gradients")
        for parameter in done:
            parameter.grad = None
        share = -(-elements // self._group.ranks)
        reduced = self._step.buffer(share, done[0], dtype, "gradients")
        shard = self._group.parameters[0].shard
        if self._share is None and shard.grad is None:
            self._share = reduced if shard.dtype == dtype else self._step.buffer(share, done[0], shard.dtype, "gradients")


class _Reduces(torch.autograd.Function):
    """Tells when all gradients of a group's inputs are there, and so those of its parameters."""

    @staticmethod
    def forward(ctx: Any, group: _Group, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.group.reduce()
        return (None, *gradients)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return values
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)
