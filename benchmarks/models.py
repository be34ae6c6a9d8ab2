"""The models that remat and its peers are compared on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peers import Batch, Built

VOCABULARY = 256
CLASSES = {"num_labels": 5, "problem_type": "single_label_classification"}


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
