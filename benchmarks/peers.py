"""What remat is compared with, each set up as its users do.

A peer is named by text, so that each can run in a process of its own: "checkpoint/2" is `torch.utils.checkpoint` around every
second block, "ratio/0.3/dp" torch's `activation_memory_budget` of 0.3 with its knapsack solver "dp". `prepare` turns a name
into something to call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import remat
from remat.backend import remat_backend  # by name it is known where remat is installed

Batch = dict[str, Any]
Built = tuple[nn.Module, Batch, list[nn.Module]]  # the model, what to call it with, its blocks

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
SOLVERS = ("dp", "greedy", "ilp")

aten = torch.ops.aten


def eager_peers(device: str) -> list[str]:
    """Plain, per-block, every-k and selective checkpointing; with an accelerator, saved tensors on the host too."""
    names = ["eager", "checkpoint/1", "checkpoint/2", "checkpoint/4", "selective/matmuls", "selective/every-second-matmul"]
    return names + (["save_on_cpu"] if device != "cpu" else [])


def compiled_peers(solvers: Sequence[str] = SOLVERS) -> list[str]:
    """`torch.compile` alone, with checkpointing, and under every ratio budget, whole and block by block."""
    checkpointed = [f"compile+checkpoint/{every}" for every in (1, 2, 4)]
    grid = list(itertools.product(("ratio", "regional"), RATIOS, solvers))
    return ["compile", *checkpointed, *(f"{how}/{ratio}/{solver}" for how, ratio, solver in grid)]


def prepare(name: str, built: Built) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A model to call, and a function that returns its loss: for a peer, or for remat, "remat/BYTES" through door 1 and
    "remat-compiled/BYTES" through door 2; "smallest" in the place of BYTES is the least that it can do. With "+host" before the
    slash values may wait on the host.
    """
    model, batch, blocks = built
    kind, *details = name.split("/")
    call: Any = model
    if kind in ("checkpoint", "compile+checkpoint"):
        for block in blocks[:: int(details[0])]:
            _checkpoint(block)
    elif kind == "selective":
        for block in blocks:
            _checkpoint(block, _CONTEXTS[details[0]])
    elif kind.startswith("remat"):
        call = _within(model, batch, kind, details[0])
    elif kind in ("ratio", "regional"):
        functorch_config.activation_memory_budget = float(details[0])
        functorch_config.activation_memory_budget_solver = details[1]
    if kind == "regional":
        for block in blocks:
            block.compile()
    elif kind in ("compile", "compile+checkpoint", "ratio"):
        call = torch.compile(model)
    if kind == "save_on_cpu":
        return call, lambda: _on_host(call, batch)
    return call, lambda: _loss(call(**batch))


def _within(model: nn.Module, batch: Batch, kind: str, budget: str) -> Any:
    host = "16GiB" if kind.endswith("+host") else 0

    def with_budget(size: int) -> Any:
        if kind.startswith("remat-compiled"):
            return torch.compile(model, backend=remat_backend, options={"budget": size, "host_budget": host})
        return remat.optimize(model, (), batch, budget=size, host_budget=host, holds_outputs=False)  # as the loop below

    if budget != "smallest":
        return with_budget(int(budget))
    try:
        with_budget(1)(**batch)
    except remat.BudgetError as error:
        return with_budget(error.minimum_bytes)
    raise AssertionError("a budget of one byte was met")


def _on_host(call: Any, batch: Batch) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return _loss(call(**batch))


def _loss(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output.loss if hasattr(output, "loss") else output[0].square().mean()


def _checkpoint(block: nn.Module, context: Any = None) -> None:
    forward = block.forward
    more = {} if context is None else {"context_fn": context}
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **more, **kwargs)  # type: ignore[method-assign]


_MATMULS = frozenset(
    [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
)


def _save_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


class _EverySecondMatmul:
    """torchtitan's policy: attention is saved, and every second matrix product."""

    def __init__(self) -> None:
        self.seen = {False: 0, True: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in (aten.mm.default, aten.addmm.default):
            self.seen[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if self.seen[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return _save_matmuls(context, op)


_CONTEXTS: dict[str, Callable[[], Any]] = {
    "matmuls": lambda: create_selective_checkpoint_contexts(_save_matmuls),
    "every-second-matmul": lambda: create_selective_checkpoint_contexts(_EverySecondMatmul()),
}
