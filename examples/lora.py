"""LoRA with PEFT on the upper half of a frozen model, prepared as LLaMA-Factory does it.

python examples/lora.py [STEPS]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from small import batches, new_model, report

import remat

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
data = batches(steps)
adapters = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3], lora_dropout=0.05)
model = get_peft_model(new_model().to(torch.bfloat16), adapters)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)

done = remat.prepare_for_training(
    model, upcast_layernorm=True, upcast_lm_head_output=True, budget=0.7, optimizer=optimizer
)  # use_gradient_checkpointing="unsloth" for Unsloth's way
print(done)

losses = []
for batch in data:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

report(model, data[0], optimizer, losses)
