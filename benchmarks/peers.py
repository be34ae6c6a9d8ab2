"""What remat is compared with, each set up as its users do, and the models it is compared on.

A peer is named by text, so that each can run in a process of its own: "checkpoint/2" is `torch.utils.checkpoint` around every
second block, "ratio/0.3/dp" torch's `activation_memory_budget` of 0.3 with its knapsack solver "dp". `prepare` turns a name
into something to call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import remat

Batch = dict[str, Any]
Built = tuple[nn.Module, Batch, list[nn.Module]]  # the model, what to call it with, its blocks

VOCABULARY = 256
CLASSES = {"num_labels": 5, "problem_type": "single_label_classification"}
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
SOLVERS = ("dp", "greedy", "ilp")

aten = torch.ops.aten


def eager_peers(device: str) -> list[str]:
    """Plain, per-block, every-k and selective checkpointing; with an accelerator, saved tensors on the host too."""
    names = ["eager", "checkpoint/1", "checkpoint/2", "checkpoint/4", "selective/matmuls", "selective/every-second-matmul"]
    return names + (["save_on_cpu"] if device != "cpu" else [])


def compiled_peers(solvers: Sequence[str] = SOLVERS) -> list[str]:
    """`torch.compile` alone, with checkpointing, and under every ratio budget, whole and block by block."""
    checkpointed = [f"compile+checkpoint/{every}" for every in (1, 2, 4)]
    grid = list(itertools.product(("ratio", "regional"), RATIOS, solvers))
    return ["compile", *checkpointed, *(f"{how}/{ratio}/{solver}" for how, ratio, solver in grid)]


def prepare(name: str, built: Built) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A model to call, and a function that returns its loss: for a peer, or for remat, "remat/BYTES" through door 1 and
    "remat-compiled/BYTES" through door 2; "smallest" in the place of BYTES is the least that it can do.
    """
    model, batch, blocks = built
    kind, *details = name.split("/")
    call: Any = model
    if kind in ("checkpoint", "compile+checkpoint"):
        for block in blocks[:: int(details[0])]:
            _checkpoint(block)
    elif kind == "selective":
        for block in blocks:
            _checkpoint(block, _CONTEXTS[details[0]])
    elif kind in ("remat", "remat-compiled"):
        call = _within(model, batch, kind == "remat-compiled", details[0])
    elif kind in ("ratio", "regional"):
        functorch_config.activation_memory_budget = float(details[0])
        functorch_config.activation_memory_budget_solver = details[1]
    if kind == "regional":
        for block in blocks:
            block.compile()
    elif kind in ("compile", "compile+checkpoint", "ratio"):
        call = torch.compile(model)
    if kind == "save_on_cpu":
        return call, lambda: _on_host(call, batch)
    return call, lambda: _loss(call(**batch))


def _within(model: nn.Module, batch: Batch, compiles: bool, budget: str) -> Any:
    def with_budget(size: int) -> Any:
        if compiles:
            return torch.compile(model, backend="remat", options={"budget": size})
        return remat.optimize(model, (), batch, budget=size)

    if budget != "smallest":
        return with_budget(int(budget))
    try:
        with_budget(1)(**batch)
    except remat.BudgetError as error:
        return with_budget(error.minimum_bytes)
    raise AssertionError("a budget of one byte was met")


def _on_host(call: Any, batch: Batch) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return _loss(call(**batch))


def _loss(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output[0].square().mean()


def _checkpoint(block: nn.Module, context: Any = None) -> None:
    forward = block.forward
    more = {} if context is None else {"context_fn": context}
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **more, **kwargs)  # type: ignore[method-assign]


_MATMULS = frozenset(
    [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    ]
)


def _save_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


class _EverySecondMatmul:
    """torchtitan's policy: attention is saved, and every second matrix product."""

    def __init__(self) -> None:
        self.seen = {False: 0, True: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in (aten.mm.default, aten.addmm.default):
            self.seen[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if self.seen[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return _save_matmuls(context, op)


_CONTEXTS: dict[str, Callable[[], Any]] = {
    "matmuls": lambda: create_selective_checkpoint_contexts(_save_matmuls),
    "every-second-matmul": lambda: create_selective_checkpoint_contexts(_EverySecondMatmul()),
}


def tokens(batch: int, length: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (batch, length))
    return {"input_ids": ids, "labels": ids}


def _decoder(width: int, layers: int, **more: Any) -> dict[str, Any]:
    common = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    return {**common, "intermediate_size": width * 8 // 3, "use_cache": False, "pad_token_id": None, **more}


def llama() -> Built:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder(256, 8)))
    return model, tokens(8, 256), list(model.model.layers)


def gpt2() -> Built:
    shape = {"vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 12, "n_head": 4, "n_positions": 256}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"  # which transformers would fall back to with a warning
    return model, tokens(8, 256), list(model.transformer.h)


def bert() -> Built:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = transformers.BertConfig(**shape, intermediate_size=1024, max_position_embeddings=256, **CLASSES)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, VOCABULARY, (8, 256))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 5, (8,))}
    return model, batch, list(model.bert.encoder.layer)


def vit() -> Built:
    shape = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 1024}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, image_size=64, patch_size=4, **CLASSES))
    blocks = [module for module in model.modules() if type(module).__name__ == "ViTLayer"]
    return model, {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 5, (8,))}, blocks


def t5() -> Built:
    shape = {"vocab_size": VOCABULARY, "d_model": 256, "d_kv": 64, "d_ff": 768, "num_layers": 4, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, use_cache=False, decoder_start_token_id=0))
    return model, tokens(8, 256), [*model.encoder.block, *model.decoder.block]


def convnext() -> Built:
    shape = {"hidden_sizes": [48, 96, 192], "depths": [3, 3, 6], "num_stages": 3}
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**shape, drop_path_rate=0.1, **CLASSES))
    blocks = [module for module in model.modules() if type(module).__name__ == "ConvNextLayer"]
    return model, {"pixel_values": torch.randn(8, 3, 128, 128), "labels": torch.randint(0, 5, (8,))}, blocks


def unet() -> Built:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    batch = {
        "sample": torch.randn(4, 4, 32, 32),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(4, 16, 64),
    }
    kinds = ("ResnetBlock2D", "Transformer2DModel")
    return model, batch, [module for module in model.modules() if type(module).__name__ in kinds]


def lora() -> Built:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    base, batch, blocks = llama()
    return peft.get_peft_model(base, config), batch, blocks


def mixtral() -> Built:
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_decoder(192, 6, num_key_value_heads=3, num_local_experts=4))
    )
    return model, tokens(8, 256), list(model.model.layers)


MODELS: dict[str, Callable[[], Built]] = {
    builder.__name__: builder for builder in (llama, gpt2, bert, vit, t5, convnext, unet, lora, mixtral)
}


def build(name: str) -> Built:
    """The same weights and inputs each time, in training mode."""
    torch.manual_seed(0)
    model, batch, blocks = MODELS[name]()
    return model.train(), batch, blocks
