"""One plan for all ranks of a data-parallel run.

    budget = 20 * 2**30 - bucket_bytes(model)
    plan = remat.distributed.plan(model, args, kwargs, budget=budget)
    model = DistributedDataParallel(remat.optimize(model, args, kwargs, budget=budget, plan=plan))

Ranks may plan by themselves, since gradients do not depend on decisions. Planned together they take equally long, and one that
has another model, other inputs or no room stops them all with an error that names it, before anything waits for anything.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

from remat import api
from remat.budget import BudgetLike
from remat.errors import RematError
from remat.plan import Plan
from remat.ranks import agreed
from remat.settings import read_settings


def plan(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    budget: BudgetLike,
    group: dist.ProcessGroup | None = None,
    dynamic_shapes: Any = None,
    device: str | None = None,
    **settings: Any,
) -> Plan:
    """Plan on every rank of `group`, and give all of them the plan of the rank with the most resident memory.

    To be called on every rank, with a model that is not wrapped yet. Other arguments and errors are those of `remat.plan`; an
    error on one rank is raised on all. DistributedDataParallel's buckets are outside of the plan: take `bucket_bytes(model)`
    off the budget.
    """
    if not dist.is_initialized():
        raise RematError("torch.distributed is not initialized; call torch.distributed.init_process_group first")

    def make() -> Plan:
        read_settings(budget, settings)
        return api.plan(model, args, kwargs, budget=budget, dynamic_shapes=dynamic_shapes, device=device, **settings)

    mine, words = agreed(make, group)
    source = max(range(len(words)), key=lambda rank: (words[rank].resident_bytes, -rank))
    is_source = dist.get_rank(group) == source
    texts = [mine.to_json() if is_source else ""]
    dist.broadcast_object_list(texts, dist.get_global_rank(group, source) if group is not None else source, group=group)
    theirs = Plan.from_json(texts[0])
    digests = [""] * len(words)
    dist.all_gather_object(digests, hashlib.sha256(texts[0].encode()).hexdigest(), group=group)
    if len({*digests}) > 1:
        raise RematError(f"the ranks did not get the same plan; by rank: {', '.join(digest[:8] for digest in digests)}")
    return theirs


def bucket_bytes(model: nn.Module) -> int:
    """What DistributedDataParallel holds in gradient buckets, in bytes: once more the size of what trains."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)
