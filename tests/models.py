"""Small models of each kind that remat promises to handle: `build(name)` returns (model in training mode, its kwargs)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import remat

Built = tuple[nn.Module, dict[str, Any]]

CLASSES = {"num_labels": 5, "problem_type": "single_label_classification"}  # else set at the first call: Dynamo compiles again

VOCABULARY, WIDTH, LENGTH, BATCH = 96, 64, 64, 4


def _ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length))


def _images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(0, 5, (BATCH,))}


def _decoder(**more: Any) -> dict[str, Any]:
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**common, "num_key_value_heads": 2, "intermediate_size": 192, "use_cache": False, "pad_token_id": None, **more}


def llama(layers: int = 2, width: int = WIDTH, length: int = LENGTH) -> Built:
    ids = _ids(length)
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder(**shape)))
    return model, {"input_ids": ids, "labels": ids}


def gpt2() -> Built:
    """Dropout 0.1, as by default."""
    ids = _ids()
    shape = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    config = transformers.GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # without it the model logs a warning, where Dynamo breaks the graph
    return model, {"input_ids": ids, "labels": ids}


def bert() -> Built:
    """Dropout 0.1, as by default."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        **CLASSES,
    )
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, LENGTH // 2 :] = 0
    labels = torch.randint(0, 2, (BATCH,))
    return transformers.BertForSequenceClassification(config), {"input_ids": _ids(), "attention_mask": mask, "labels": labels}


def vit() -> Built:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=4, **CLASSES)
    return transformers.ViTForImageClassification(config), _images()


def qwen3() -> Built:
    ids = _ids()
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_decoder(head_dim=16)))
    return model, {"input_ids": ids, "labels": ids}


def t5() -> Built:
    """Encoder and decoder, dropout 0.1."""
    shape = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH, "num_heads": 4}
    config = transformers.T5Config(**shape, num_layers=2, num_decoder_layers=1, use_cache=False, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": _ids(), "labels": _ids(48)}


def mixtral() -> Built:
    """Mixture of experts with top-2 routing."""
    ids = _ids(48)
    config = transformers.MixtralConfig(**_decoder(num_local_experts=4, intermediate_size=2 * WIDTH))
    return transformers.MixtralForCausalLM(config), {"input_ids": ids, "labels": ids}


def lora() -> Built:
    """Llama with a frozen base; only the adapters train."""
    import peft

    model, kwargs = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config), kwargs


def resnet() -> Built:
    """Batch norm."""
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic", **CLASSES}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape)), _images()


def convnext() -> Built:
    """Drop path 0.2."""
    shape = {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2}
    config = transformers.ConvNextConfig(**shape, drop_path_rate=0.2, **CLASSES)
    return transformers.ConvNextForImageClassification(config), _images()


def encoder() -> Built:
    """`torch.nn.TransformerEncoder`: no loss, one tensor out."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(BATCH, LENGTH, WIDTH)}


class Gated(nn.Module):
    """Ops that no transformer has: a GRU cell, which writes into parts of a split, top-k, and one value read six times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(WIDTH, WIDTH), nn.Linear(6 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(x)
        decay = torch.exp(-hidden.abs())
        read = torch.cat([hidden, decay, hidden * decay, decay + 1, hidden - decay, torch.sin(decay)], -1)
        state = self.cell(self.out(read), hidden)
        deviation, mean = torch.std_mean(state, -1)
        return (state * state).mean() + deviation.mean() + mean.mean() + hidden.topk(8, -1).values.mean()


def gated() -> Built:
    return Gated(), {"x": torch.randn(BATCH * LENGTH, WIDTH)}


MODELS: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (llama, gpt2, bert, vit, qwen3, t5, mixtral, lora, resnet, convnext, encoder, gated)
}


_OF_A_KIND = {"gpt2", "bert", "qwen3", "lora", "resnet", "encoder"}  # with another of them
EACH_MODEL = [pytest.param(name, marks=[pytest.mark.slow] if name in _OF_A_KIND else []) for name in MODELS]


def build(name: str) -> Built:
    """The same weights and inputs each time."""
    torch.manual_seed(0)
    model, kwargs = MODELS[name]()
    return model.train(), kwargs


class Mlp(nn.Module):
    """A stack of linear layers with dropout: the smallest model with something to plan."""

    def __init__(self, width: int = 32, layers: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return x.square().mean()


@functools.cache
def smallest_budget(**shape: Any) -> int:
    """The smallest at which `mlp` of this shape trains."""
    model, x = mlp(**shape)
    return remat.frontier(model, (x,), points=2)[-1].peak_bytes


def mlp(rows: int = 64, **shape: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Mlp(**shape).train(), torch.randn(rows, shape.get("width", 32))


_LIBRARY = torch.library.Library("remat_tests", "FRAGMENT")
_LIBRARY.define("weighted(Tensor x) -> Tensor")
_LIBRARY.impl("weighted", lambda x: x * torch.tensor([[0.5, 2.0] * 64] * 512), "CompositeImplicitAutograd")


class Weighted(nn.Module):
    """Calls an op that is made of others, and that brings a constant along at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(128, 128) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(torch.ops.remat_tests.weighted(layer(x)))
        return x.square().mean()
