"""fully_shard on two processes, as torchtitan trains: PyTorch's own distributed engine, and each block within one budget.

torchrun --nproc-per-node 2 examples/fsdp.py [STEPS]

On a cluster the same with `--nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:PORT`, and "nccl" where there are GPUs.
"""

import sys

import torch
import torch.distributed as dist
from small import batches, new_model, report
from torch.distributed.fsdp import fully_shard

import remat

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model, data = new_model(), batches(steps * ranks)[rank::ranks]

for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # of this rank's share
remat.optimize_blocks(model, budget=0.75, optimizer=optimizer)  # of each rank; or bytes: budget="20GiB"

losses = []
for batch in data:
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

report(model, data[0], optimizer, losses, quiet=rank > 0)  # on every rank: its step gathers
dist.destroy_process_group()
