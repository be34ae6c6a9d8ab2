"""Lightning's Trainer, with one callback.

python examples/lightning_fit.py [STEPS]
"""

import sys

import lightning.pytorch as pl
import torch
from small import new_model, report, windows

from remat.lightning import RematCallback

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30


class Bytes(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.losses = new_model(), []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


module = Bytes()
loader = torch.utils.data.DataLoader(windows(8 * steps), batch_size=8)
trainer = pl.Trainer(
    max_epochs=1,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    callbacks=[RematCallback(budget=0.5)],  # or bytes: budget="20GiB"
)
trainer.fit(module, loader)
report(module.model, next(iter(loader)), trainer.optimizers[0], module.losses)
