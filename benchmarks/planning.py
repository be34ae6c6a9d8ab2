"""How long planning takes after tracing, for Llama shapes of 12, 48 and 96 layers.

Equal layers are solved once, so that depth costs little. Width does not matter here and is kept small.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from remat.settings import Settings
from remat.whole import trace

LAYERS = (12, 48, 96)
BUDGETS = (0.6, 0.4, 0.25)  # shares of the activation memory
RESULTS = Path(__file__).parent / "results" / "planning.json"


def main() -> None:
    rows = [row for layers in LAYERS for row in measure(layers)]
    table = Table("layers", "budget", "planning s", "tracing s", "predicted peak", "recompute")
    for row in rows:
        table.add_row(
            str(row["layers"]),
            f"{row['budget']:.0%}",
            f"{row['planning_s']:.2f}",
            f"{row['tracing_s']:.1f}",
            f"{row['peak_bytes'] / 2**20:.1f} MiB",
            f"{row['recompute']:.1%}",
        )
    Console().print(table)
    medians = {n: statistics.median(row["planning_s"] for row in rows if row["layers"] == n) for n in LAYERS}
    print(f"96 layers take {medians[96] / medians[48]:.2f} × as long as 48 (medians over budgets)")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def measure(layers: int) -> list[dict[str, float]]:
    """Trace a model once and plan it for each budget."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=layers,
        num_attention_heads=4,
        use_cache=False,
    )
    tokens = torch.randint(0, 256, (4, 64))
    start = time.perf_counter()
    traced = trace(LlamaForCausalLM(config), (), {"input_ids": tokens, "labels": tokens})
    seconds = time.perf_counter() - start
    plans = [(budget, traced.plan(Settings(budget))) for budget in BUDGETS]
    return [
        {
            "layers": layers,
            "budget": budget,
            "planning_s": plan.planning_seconds,
            "tracing_s": seconds,
            "peak_bytes": plan.peak_bytes,
            "baseline_peak_bytes": plan.baseline_peak_bytes,
            "recompute": plan.recompute_us / plan.baseline_step_us,
        }
        for budget, plan in plans
    ]


if __name__ == "__main__":
    main()
