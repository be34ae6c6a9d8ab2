"""A loop with accelerate: mixed precision and gradient accumulation. Enable first, prepare after.

python examples/accelerate_loop.py [STEPS]
"""

import sys

import torch
from accelerate import Accelerator
from small import batches, new_model, report

import remat

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
model, data = new_model(), batches(steps)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

remat.enable(model, budget=0.7, optimizer=optimizer)
model, optimizer = accelerator.prepare(model, optimizer)

losses = []
for batch in data:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

report(model, data[0], optimizer.optimizer, losses)
