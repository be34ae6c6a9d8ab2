"""A TransformerEncoder trained in half of its activation memory."""

import torch

import remat

layer = torch.nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, batch_first=True)
model = torch.nn.TransformerEncoder(layer, num_layers=6)
batch = torch.randn(8, 256, 256)

model = remat.optimize(model, (batch,), budget=0.5)  # or bytes: budget="96MiB"
print(model.plan.summary())

loss = model(batch).square().mean()
loss.backward()
