"""What each of two processes does in the tests of several ranks: each writes what it found, or the error, as JSON.

torchrun --nproc-per-node 2 tests/distributed_steps.py FOLDER CASE ...
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import remat
from remat import distributed
from remat._torch import local
from tests.models import llama, mlp
from tests.steps import gradients_of, loss_of


def ddp(rank: int) -> dict[str, Any]:
    """100 steps of DDP with one plan for both ranks, beside DDP without; and its gradients beside those of one process."""
    torch.manual_seed(0)
    model, kwargs = llama(layers=2)
    both = [_rolled(kwargs, r) for r in range(dist.get_world_size())]
    alone = [gradients_of(model, **each) for each in both]
    budget = int(0.8 * remat.plan(model, (), both[rank], budget=None).peak_bytes)
    plan = distributed.plan(model, (), both[rank], budget=budget)
    plain = DistributedDataParallel(copy.deepcopy(model))
    ours = DistributedDataParallel(remat.optimize(model, (), both[rank], budget=budget, plan=plan))
    fired: list[str] = []
    for name, parameter in ours.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    together = gradients_of(ours.module, **both[rank])  # not through DDP: this rank's own
    measured = remat.measure(lambda: loss_of(ours(**both[rank]), both[rank]).backward())
    averaged = {name: p.grad for name, p in ours.module.named_parameters() if p.grad is not None}
    apart = max(_distance(averaged[name], sum(g[name] for g in alone) / len(alone)) for name in averaged)
    return {
        "own": max(_distance(together[name], alone[rank][name]) for name in together),
        "averaged": apart,
        "hooks": sorted({fired.count(name) for name in fired}),
        "dropped": len(plan.dropped),
        "plan": plan.to_json(),
        "over": measured.peak_bytes - budget,
        "losses": _losses(ours, both[rank]),
        "expected": _losses(plain, both[rank]),
    }


def fsdp(rank: int) -> dict[str, Any]:
    """100 steps of FSDP2, each block within one budget for the rank, beside FSDP2 without; gradients beside one process."""
    torch.manual_seed(0)
    model, kwargs = llama(layers=3)
    both = [_rolled(kwargs, r) for r in range(dist.get_world_size())]
    alone = [gradients_of(model, **each) for each in both]
    plain, ours = (_sharded(copy.deepcopy(model)) for _ in range(2))
    remat.optimize_blocks(ours, (), both[rank], budget=0.8)
    plan = remat.plan_of(ours)
    assert plan is not None
    over = [remat.measure(lambda: loss_of(ours(**both[rank]), both[rank]).backward()).peak_bytes - plan.peak_bytes]
    summed = {name: p.grad.full_tensor() for name, p in ours.named_parameters()}
    step = remat.measure(lambda: loss_of(ours(**both[rank]), both[rank]).backward())  # adds to gradients
    adding = remat.plan_of(ours)
    assert adding is not None
    return {
        "apart": max(_distance(summed[name], sum(g[name] for g in alone) / len(alone)) for name in summed),
        "over": [*over, step.peak_bytes - adding.peak_bytes],
        "budget": [plan.peak_bytes <= (plan.budget_bytes or 0), adding.peak_bytes <= (adding.budget_bytes or 0)],
        "dropped": len(plan.dropped),
        "resident": plan.resident_bytes,
        "whole": sum(p.nbytes for p in model.parameters()),
        "losses": _losses(ours, both[rank]),
        "expected": _losses(plain, both[rank]),
    }


def fsdp_later(rank: int) -> dict[str, Any]:
    """Sharded, and in bfloat16, after remat was asked for; a mixed batch of shapes."""
    torch.manual_seed(0)
    model, kwargs = llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours, plain = copy.deepcopy(model), _sharded(copy.deepcopy(model), mp_policy=policy)
    _sharded(remat.optimize_blocks(ours, budget=0.8), mp_policy=policy)
    found = []
    for length in (64, 32 + 16 * rank, 64):  # the ranks need not have the same shapes
        ids = _rolled(kwargs, rank)["input_ids"][:, :length]
        for each in (ours, plain):
            each(input_ids=ids, labels=ids).loss.backward()
        plan = remat.plan_of(ours)
        found.append(plan.peak_bytes if plan is not None else 0)
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    return {"same": all(torch.equal(a.grad.full_tensor(), b.grad.full_tensor()) for a, b in pairs), "peaks": found}


def fsdp_other_model(rank: int) -> dict[str, Any]:
    """Ranks whose blocks differ."""
    model, x = mlp(layers=2)
    if rank:
        model.layers[1].append(nn.Tanh())
    remat.optimize_blocks(_sharded(model, model.layers), (x,), budget=0.9)
    return {"plan": 0}


def fsdp_no_room(rank: int) -> dict[str, Any]:
    """A budget that one rank cannot meet."""
    model, x = mlp(layers=2)
    remat.optimize_blocks(_sharded(model, model.layers), (x,), budget=1000 if rank else None)
    return {"plan": 0}


def fsdp_whole(rank: int) -> dict[str, Any]:
    """A model that is planned as a whole, and sharded after that."""
    model, x = mlp(layers=2)
    _sharded(remat.enable(model, 0.9), model.layers)(x)
    return {"plan": 0}


def tensor_parallel(rank: int) -> dict[str, Any]:
    """Blocks whose matrices lie on both ranks, compiled within a budget."""
    torch.manual_seed(0)
    model, x = mlp(rows=256, dropout=0.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        parallelize_module(layer, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    ours = copy.deepcopy(model)
    step = torch.compile(ours, backend="remat", options={"budget": 0.6, "compiler": "eager"})
    peaks = []
    for run in (model, step):
        run(x).backward()
        # The least of a few: gloo's threads let go of what they have reduced when they get to it.
        peaks.append(min(remat.measure(lambda run=run: run(x).backward()).peak_bytes for _ in range(5)))
    pairs = zip(ours.parameters(), model.parameters(), strict=True)
    plan = remat.plans(step)[0].plan
    return {
        "apart": max(_distance(local(a.grad), local(b.grad)) for a, b in pairs),
        "peaks": peaks,
        "budget": plan.budget_bytes,
        "dropped": len(plan.dropped),
    }


def tensor_parallel_blocks(rank: int) -> dict[str, Any]:
    """The same block by block, which cannot be."""
    model, x = mlp()
    parallelize_module(model.layers[0], init_device_mesh("cpu", (dist.get_world_size(),)), {"1": ColwiseParallel()})
    remat.optimize_blocks(model, (x,), budget=0.9)
    return {"plan": 0}


def pipeline(rank: int) -> dict[str, Any]:
    """A stage on each rank, with a budget of its own, under PyTorch's 1F1B schedule."""
    torch.manual_seed(0)
    wide = [nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6)]
    x, y = torch.randn(512, 32), torch.randn(512, 32)
    plain = nn.Sequential(*copy.deepcopy(wide))
    for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
        (nn.functional.mse_loss(plain(part), target) / 4).backward()
    expected = [p.grad for p in plain[3 * rank : 3 * rank + 3].parameters()]
    stage = nn.Sequential(*wide[3 * rank : 3 * rank + 3])
    remat.enable(stage, (0.6, 0.8)[rank], in_flight=2 - rank)
    schedule = Schedule1F1B(PipelineStage(stage, rank, 2, torch.device("cpu")), 4, loss_fn=nn.functional.mse_loss)

    def step() -> None:
        schedule.step(*(() if rank else (x,)), **({"target": y} if rank else {}))

    step()
    apart = max(_distance(p.grad, g) for p, g in zip(stage.parameters(), expected, strict=True) if p.grad is not None)
    plan = remat.plan_of(stage)
    assert plan is not None
    return {"apart": apart, "dropped": len(plan.dropped), "over": plan.peak_bytes - (plan.budget_bytes or 0)}


def _sharded(model: Any, blocks: Any = None, **policy: Any) -> Any:
    for block in model.model.layers if blocks is None else blocks:
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def other_model(rank: int) -> dict[str, Any]:
    """Ranks with different models."""
    model, x = mlp(layers=2 + rank)
    return {"plan": distributed.plan(model, (x,), budget=0.8).peak_bytes}


def other_shape(rank: int) -> dict[str, Any]:
    """Ranks with different inputs."""
    model, x = mlp(rows=8 + rank)
    return {"plan": distributed.plan(model, (x,), budget=None).peak_bytes}


def wrong_setting(rank: int) -> dict[str, Any]:
    """A setting that there is not, on one rank."""
    model, x = mlp()
    return {"plan": distributed.plan(model, (x,), budget=None, **({"polcy": "blocks"} if rank else {})).peak_bytes}


def fault(rank: int) -> dict[str, Any]:
    """Something that is not remat's error, on one rank."""
    model, x = mlp()
    optimizer: Any = SimpleNamespace(param_groups=()) if rank else None  # and no state
    return {"plan": distributed.plan(model, (x,), budget=None, optimizer=optimizer).peak_bytes}


def no_room(rank: int) -> dict[str, Any]:
    """A budget that one rank cannot meet."""
    model, x = mlp()
    return {"plan": distributed.plan(model, (x,), budget=1000 if rank else None).peak_bytes}


def _rolled(kwargs: dict[str, Any], rank: int) -> dict[str, Any]:
    ids = kwargs["input_ids"].roll(rank, 1)
    return {"input_ids": ids, "labels": ids}


def _distance(a: torch.Tensor, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def _losses(model: nn.Module, kwargs: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_of(model(**kwargs), kwargs)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    folder, *cases = sys.argv[1:]
    said: dict[str, Any] = {}
    for case in cases:
        try:
            said[case] = globals()[case](rank)
        except remat.RematError as error:
            said[case] = {"error": type(error).__name__, "text": str(error)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    gc.collect()  # what DDP holds of the process group goes before it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
