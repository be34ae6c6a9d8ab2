"""A loop of your own: AdamW, clipping, and an average of the weights.

python examples/plain_loop.py [STEPS]
"""

import sys

import torch
from small import batches, new_model, report
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import remat

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
model, data = new_model(), batches(steps)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))

remat.enable(model, budget=0.5, optimizer=optimizer)  # or bytes: budget="20GiB"

losses = []
for batch in data:
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    losses.append(loss.item())

report(model, data[0], optimizer, losses)
