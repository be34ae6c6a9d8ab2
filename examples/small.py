"""What the examples share: a small Llama over bytes, and the source text of Python's standard library to train it on."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import remat

LENGTH = 128


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).train()


def windows(count: int) -> list[dict[str, torch.Tensor]]:
    """Random windows of text, a byte a token, without a batch axis."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"\n".join(file.read_bytes() for file in files)))
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in text[starts + torch.arange(LENGTH)]]


def batches(steps: int, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    found = windows(steps * rows)
    groups = [found[i : i + rows] for i in range(0, len(found), rows)]
    return [{name: torch.stack([row[name] for row in group]) for name in group[0]} for group in groups]


def report(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], optimizer: Any, losses: list[float], quiet: bool = False
) -> None:
    """One line: what was predicted, what the allocator did in one more step, and what was learned."""
    model.zero_grad()

    def step() -> int:
        model(**batch).loss.backward()
        return len(optimizer.state)  # the optimizer's state is there, too

    measured = remat.measure(step)
    if quiet:
        return
    plan = remat.plan_of(model)
    assert plan is not None, "a step has run"
    sizes = plan.baseline_peak_bytes, plan.peak_bytes, measured.peak_bytes
    baseline, planned, found = (f"{size / 2**20:.1f} MiB" for size in sizes)
    print(f"peak {baseline} with everything saved, {planned} as planned, {found} measured; ", end="")
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps")
