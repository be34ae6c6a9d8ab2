"""The Trainer of transformers, with one callback.

python examples/trainer.py [STEPS]
"""

import sys
import tempfile

from small import new_model, report, windows
from transformers import Trainer, TrainingArguments

from remat.hf import RematCallback

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
model, budget = new_model(), RematCallback(budget=0.5)  # or bytes: budget="20GiB"
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=windows(8 * steps), callbacks=[budget])
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
report(model, next(iter(trainer.get_train_dataloader())), trainer.optimizer, losses)
