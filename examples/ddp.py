"""DistributedDataParallel on two processes, with one plan for both.

torchrun --nproc-per-node 2 examples/ddp.py [STEPS]
"""

import sys

import torch
import torch.distributed as dist
from small import batches, new_model, report
from torch.nn.parallel import DistributedDataParallel

import remat
from remat import distributed

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model, data = new_model(), batches(steps * ranks)[rank::ranks]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# In bytes: what a rank may use, less DDP's buckets, say 20 * 2**30 - distributed.bucket_bytes(model).
budget = 0.5
plan = distributed.plan(model, (), data[0], budget=budget, optimizer=optimizer)
remat.enable(model, budget, plan=plan, optimizer=optimizer)
wrapped = DistributedDataParallel(model)

losses = []
for batch in data:
    loss = wrapped(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

if rank == 0:
    report(model, data[0], optimizer, losses)
del wrapped  # after its process group, it may wait for that forever
dist.destroy_process_group()
