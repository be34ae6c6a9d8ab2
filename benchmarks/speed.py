"""What a budget costs in time, against the plain model and per-block `torch.utils.checkpoint`.

Each round runs one forward and backward of every variant, in turn; a variant's ratio is the median over rounds of its
process CPU time divided by the reference's in the same round, so that a busy machine slows both sides. On one thread:
the CPU time of several counts how long they spin for each other, which on a busy machine is most of it. Peaks are of
`remat.measure` on a warm step, gradients included.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import remat

RESULTS = Path(__file__).parent / "results" / "speed.json"
Batch = dict[str, torch.Tensor]
Variant = tuple[Any, int | None]  # what to call, and its budget in bytes


@dataclass(frozen=True)
class Row:
    model: str
    variant: str
    reference: str
    peak_bytes: int
    budget_bytes: int | None
    cpu_s: float
    ratio: float
    low: float
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [
        *against_checkpointing("Llama 12 x 384, 4 x 256 tokens", llama(384), tokens(4, 256), rounds),
        *against_checkpointing("GPT-2 12 x 256, 8 x 256 tokens", gpt2(256), tokens(8, 256), rounds),
        *without_budget("Llama 12 x 512, 4 x 256 tokens", llama(512), tokens(4, 256), rounds),
    ]
    show(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    data = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds}
    RESULTS.write_text(json.dumps({**data, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def llama(width: int, layers: int = 12) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def gpt2(width: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=256,
        n_embd=width,
        n_layer=12,
        n_head=width // 64,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which transformers would fall back to with a warning
    return model


def tokens(batch: int, length: int) -> Batch:
    ids = torch.randint(0, 256, (batch, length))
    return {"input_ids": ids, "labels": ids}


def against_checkpointing(name: str, model: Any, batch: Batch, rounds: int) -> list[Row]:
    """Plain, per-block checkpointing, and door 1 at 1 and 1.5 times the peak that checkpointing has."""
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    block_peak = peak_of(checkpointed, batch)
    variants: dict[str, Variant] = {"checkpoint per block": (checkpointed, None), "plain": (model, None)}
    for factor in (1.0, 1.5):
        budget = int(factor * block_peak)
        variants[f"door 1 at {factor} x its peak"] = (remat.optimize(model, (), batch, budget=budget), budget)
    return compare(name, variants, batch, rounds)


def without_budget(name: str, model: Any, batch: Batch, rounds: int) -> list[Row]:
    """What door 1 costs when it recomputes nothing."""
    variants: dict[str, Variant] = {
        "plain": (model, None),
        "door 1, budget=None": (remat.optimize(model, (), batch, budget=None), None),
    }
    return compare(name, variants, batch, rounds)


def peak_of(model: Any, batch: Batch) -> int:
    """Peak of a warm forward and backward that starts without gradients."""
    run_once(model, batch)
    peak = remat.measure(lambda: model(**batch).loss.backward()).peak_bytes
    model.zero_grad()
    return peak


def run_once(model: Any, batch: Batch) -> float:
    """Process CPU seconds of one forward and backward."""
    start = time.process_time()
    model(**batch).loss.backward()
    seconds = time.process_time() - start
    model.zero_grad()
    return seconds


def compare(name: str, variants: dict[str, Variant], batch: Batch, rounds: int) -> list[Row]:
    """Time all variants in turn; the first is the reference."""
    peaks = {variant: peak_of(model, batch) for variant, (model, _) in variants.items()}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, (model, _) in variants.items():
            times[variant].append(run_once(model, batch))
    reference = next(iter(variants))
    rows = []
    for variant, (_, budget) in variants.items():
        ratios = sorted(a / b for a, b in zip(times[variant], times[reference], strict=True))
        rows.append(
            Row(
                name,
                variant,
                reference,
                peaks[variant],
                budget,
                statistics.median(times[variant]),
                statistics.median(ratios),
                ratios[0],
                ratios[-1],
            )
        )
    return rows


def show(rows: list[Row]) -> None:
    table = Table("model", "variant", "budget MiB", "measured peak MiB", "CPU s", "ratio", "lowest to highest")
    last = ""
    for row in rows:
        if row.model != last:
            table.add_section()
        table.add_row(
            row.model if row.model != last else "",
            row.variant,
            "" if row.budget_bytes is None else f"{row.budget_bytes / 2**20:.1f}",
            f"{row.peak_bytes / 2**20:.1f}",
            f"{row.cpu_s:.3f}",
            f"{row.ratio:.3f}",
            "" if row.variant == row.reference else f"{row.low:.3f} to {row.high:.3f}",
        )
        last = row.model
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    console.print("ratio: median over rounds of CPU time against the first variant of the group, in the same round")


if __name__ == "__main__":
    main()
