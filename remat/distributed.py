"""One plan for all ranks of a data-parallel run.

    budget = 20 * 2**30 - bucket_bytes(model)
    plan = remat.distributed.plan(model, args, kwargs, budget=budget)
    model = DistributedDataParallel(remat.optimize(model, args, kwargs, budget=budget, plan=plan))

Ranks may plan by themselves, since gradients do not depend on decisions. Planned together they take equally long, and one that
has another model, other inputs or no room stops them all with an error that names it, before anything waits for anything.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from remat import api
from remat.budget import BudgetLike, format_bytes
from remat.errors import BudgetError, RematError
from remat.inplace import read_settings
from remat.plan import Input, Plan


class _Word(NamedTuple):
    """What a rank says of its own plan: `error` in the place of one."""

    error: RematError | None
    fingerprint: str = ""
    model: str = ""
    inputs: tuple[Input, ...] = ()
    resident_bytes: int = 0


def plan(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike,
    group: dist.ProcessGroup | None = None,
    **settings: Any,
) -> Plan:
    """Plan on every rank of `group`, and give all of them the plan of the rank with the most resident memory.

    To be called on every rank, with a model that is not wrapped yet. Other arguments and errors are those of `remat.plan`; an
    error on one rank is raised on all. DistributedDataParallel's buckets are outside of the plan: take `bucket_bytes(model)`
    off the budget.
    """
    if not dist.is_initialized():
        raise RematError("torch.distributed is not initialized; call torch.distributed.init_process_group first")
    try:
        read_settings(budget, settings)
        mine = api.plan(model, args, kwargs, budget=budget, **settings)
        word = _Word(None, mine.fingerprint, mine.model, mine.inputs, mine.resident_bytes)
    except Exception as error:  # of any kind: the other ranks wait for a word
        word = _Word(_portable(error))
    words: list[_Word] = [word] * dist.get_world_size(group)
    dist.all_gather_object(words, word, group=group)
    _check(words)
    source = max(range(len(words)), key=lambda rank: (words[rank].resident_bytes, -rank))
    is_source = dist.get_rank(group) == source
    texts = [mine.to_json() if is_source else ""]
    dist.broadcast_object_list(texts, dist.get_global_rank(group, source) if group is not None else source, group=group)
    agreed = Plan.from_json(texts[0])
    digests = [""] * len(words)
    dist.all_gather_object(digests, hashlib.sha256(texts[0].encode()).hexdigest(), group=group)
    if len({*digests}) > 1:
        raise RematError(f"the ranks did not get the same plan; by rank: {', '.join(digest[:8] for digest in digests)}")
    return agreed


def bucket_bytes(model: nn.Module) -> int:
    """What DistributedDataParallel holds in gradient buckets, in bytes: once more the size of what trains."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _portable(error: Exception) -> RematError:
    """The same error without what it came from, which may not travel between processes; others' errors as ours."""
    if isinstance(error, BudgetError):
        return BudgetError(str(error), budget_bytes=error.budget_bytes, minimum_bytes=error.minimum_bytes, where=error.where)
    return type(error)(str(error)) if isinstance(error, RematError) else RematError(f"{type(error).__name__}: {error}")


def _check(words: list[_Word]) -> None:
    for rank, word in enumerate(words):
        if word.error is not None:
            word.error.args = (f"on rank {rank}: {word.error}",)
            raise word.error
    first = words[0]
    for rank, word in enumerate(words):
        if word.fingerprint != first.fingerprint:
            raise RematError(f"ranks 0 and {rank} differ: {_shown(first)} on rank 0, {_shown(word)} on rank {rank}")


def _shown(word: _Word) -> str:
    inputs = ", ".join(f"{i.name} {'x'.join(map(str, i.shape))} {i.dtype}" for i in word.inputs)
    return f"{word.model}({inputs}), graph {word.fingerprint}, {format_bytes(word.resident_bytes)} resident"
