"""Plans for devices that are not there: Llama-3 shapes in bfloat16 on `meta`, batch 1, all of the device's memory.

Predictions, and what planning them took here: seconds with tracing, and the memory of this process at its peak.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import remat

RESULTS = Path(__file__).parent / "results" / "absent.json"
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
CASES = (
    ("8B", "LoRA", 4096, "rtx4090"),
    ("8B", "LoRA", 8192, "rtx4090"),
    ("8B", "LoRA, loss in chunks", 8192, "rtx4090"),
    ("8B", "LoRA", 8192, "rtx5090"),
    ("8B", "AdamW", 32768, "h200"),
    ("70B", "LoRA", 4096, "h200"),
)


@dataclass(frozen=True)
class Row:
    """Bytes and microseconds as in `remat.Plan`; without a plan, `peak_bytes` is the smallest that would work."""

    model: str
    tokens: int
    device: str
    fits: bool
    baseline_peak_bytes: int
    peak_bytes: int
    host_bytes: int
    baseline_step_us: float
    step_us: float
    recompute_us: float
    stall_us: float
    seconds: float
    process_gib: float


def main() -> None:
    rows = [plan(*case) for case in track(CASES, "planning")]
    table = Table(
        "model", "tokens", "device", "all saved", "planned", "on the host", "step grows by", "waiting", "seconds", "process"
    )
    for row in rows:
        table.add_row(
            row.model,
            str(row.tokens),
            row.device,
            f"{row.baseline_peak_bytes / 2**30:.1f} GiB" if row.fits else "",
            f"{row.peak_bytes / 2**30:.1f} GiB" + ("" if row.fits else " needed"),
            f"{row.host_bytes / 2**30:.1f} GiB" if row.fits else "",
            f"{row.step_us / row.baseline_step_us - 1:.1%}" if row.fits else "",
            f"{row.stall_us / row.baseline_step_us:.1%}" if row.fits else "",
            f"{row.seconds:.0f}",
            f"{row.process_gib:.2f} GiB",
        )
    Console(width=130).print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    data = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def plan(size: str, method: str, tokens: int, device: str) -> Row:
    model, optimizer = build(size, method)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    start = time.perf_counter()
    try:
        found = remat.plan(model, (), {"input_ids": ids, "labels": ids}, budget="auto", device=device, optimizer=optimizer)
        fits, peak = True, found.peak_bytes
    except remat.BudgetError as error:
        found, fits, peak = None, False, error.minimum_bytes or 0
    seconds = time.perf_counter() - start
    process_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    numbers = (
        (
            found.baseline_peak_bytes,
            peak,
            found.host_bytes,
            found.baseline_step_us,
            found.step_us,
            found.recompute_us,
            found.stall_us,
        )
        if found is not None
        else (0, peak, 0, 0.0, 0.0, 0.0, 0.0)
    )
    return Row(f"{size} {method}", tokens, device, fits, *numbers, seconds, process_gib)


class ChunkedLoss(torch.nn.Module):
    """A causal language model whose loss is summed over chunks of tokens, so that the logits of one lie in memory at a time."""

    def __init__(self, model: Any, chunk: int = 1024) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        language_model = self.model.get_base_model()
        hidden = language_model.model(input_ids).last_hidden_state[:, :-1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        for states, wanted in zip(hidden.split(self.chunk, 1), labels[:, 1:].split(self.chunk, 1), strict=True):
            logits = language_model.lm_head(states).float()
            loss = loss + cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        return loss / (labels.numel() - len(labels))


def build(size: str, method: str) -> tuple[Any, torch.optim.Optimizer | None]:
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, rope_theta=5e5, use_cache=False, **SHAPES[size])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        if method.startswith("LoRA"):
            adapters = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, adapters)
            return model if method == "LoRA" else ChunkedLoss(model), None
    return model, torch.optim.AdamW(model.parameters())


if __name__ == "__main__":
    main()
