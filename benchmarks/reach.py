"""How small door 2 with Inductor gets, against the lowest peak of any ratio of torch's `activation_memory_budget`.

Whole models, peaks of `remat.measure` on a warm step, above the parameters, gradients included. The models are deep and
narrow, so that activations outweigh parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from compiled import with_ratio, within
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed import Batch, gpt2, llama, peak_of, tokens

import remat

RESULTS = Path(__file__).parent / "results" / "reach.json"
RATIOS = (0.6, 0.4, 0.3, 0.2, 0.1)
LAYERS, WIDTH = 8, 128


@dataclass(frozen=True)
class Reach:
    """Peaks in bytes above the parameters; `share` of the lowest ratio's."""

    model: str
    ratio_peaks: dict[str, int]
    smallest_bytes: int
    share: float


def main() -> None:
    torch._dynamo.config.recompile_limit = 100  # every variant is compiled from the same code
    wanted = sys.argv[1:]
    reaches = [reach(*model) for model in models() if not wanted or model[0].split()[0] in wanted]
    table = Table("model", *(f"ratio {ratio}" for ratio in RATIOS), "remat", "share of the lowest")
    for found in reaches:
        peaks = (f"{peak / 2**20:.1f}" for peak in found.ratio_peaks.values())
        table.add_row(found.model, *peaks, f"{found.smallest_bytes / 2**20:.1f}", f"{found.share:.2f}")
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    console.print("peaks in MiB above the parameters")
    RESULTS.parent.mkdir(exist_ok=True)
    data = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    RESULTS.write_text(json.dumps({**data, "rows": [asdict(found) for found in reaches]}, indent=1) + "\n")


def reach(name: str, model: Any, batch: Batch) -> Reach:
    resident = sum(p.nbytes for p in model.parameters())
    ratios = track(RATIOS, f"{name}: ratios")
    above = {str(ratio): peak_of(with_ratio(model, ratio), batch) - resident for ratio in ratios}
    smallest = peak_of(within(model, smallest_budget(model, batch)), batch) - resident
    return Reach(name, above, smallest, smallest / min(above.values()))


def smallest_budget(model: Any, batch: Batch) -> int:
    try:
        within(model, 1)(**batch)
    except remat.BudgetError as error:
        return error.minimum_bytes
    raise AssertionError("a budget of one byte was met")


def models() -> Iterator[tuple[str, Any, Batch]]:
    """Transformers with dropout as by default."""
    batch = tokens(8, 256)
    yield "GPT-2 12 x 256", gpt2(256), batch
    yield "Llama 8 x 256", llama(256, layers=LAYERS), batch
    common = {"vocab_size": 256, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    decoder = {**common, "num_key_value_heads": 2, "intermediate_size": 3 * WIDTH, "use_cache": False, "pad_token_id": None}
    classes = {"num_labels": 5, "problem_type": "single_label_classification"}
    labels = torch.randint(0, 5, (8,))
    bert = transformers.BertConfig(**common, intermediate_size=4 * WIDTH, max_position_embeddings=256, **classes)
    ids = {"input_ids": batch["input_ids"], "attention_mask": torch.ones(8, 256, dtype=torch.long)}
    yield "BERT 8 x 128", transformers.BertForSequenceClassification(bert), {**ids, "labels": labels}
    vit = transformers.ViTConfig(**common, intermediate_size=4 * WIDTH, image_size=64, patch_size=4, **classes)
    images = torch.randn(8, 3, 64, 64)
    yield "ViT 8 x 128", transformers.ViTForImageClassification(vit), {"pixel_values": images, "labels": labels}
    yield "Qwen3 8 x 128", transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**decoder, head_dim=32)), batch
    shape = {"vocab_size": 256, "d_model": WIDTH, "d_kv": 32, "d_ff": 3 * WIDTH, "num_layers": 4, "num_heads": 4}
    t5 = transformers.T5Config(**shape, use_cache=False, decoder_start_token_id=0)
    yield "T5 4 + 4 x 128", transformers.T5ForConditionalGeneration(t5), batch
    mixtral = transformers.MixtralConfig(**decoder, num_local_experts=4)
    yield "Mixtral 8 x 128", transformers.MixtralForCausalLM(mixtral), batch
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    yield "LoRA on Llama 8 x 256", peft.get_peft_model(llama(256, layers=LAYERS), lora), batch


if __name__ == "__main__":
    main()
