"""LoRA over a quantised base: weights are tensor subclasses, which only door 2 takes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import remat
from tests.steps import assert_close_gradients, gradients_of

pytestmark = [pytest.mark.usefixtures("_dynamo"), pytest.mark.filterwarnings("ignore")]  # torchao's own, many

_LAYERS = 4


def quantised() -> torch.nn.Module:
    """Weights in int8, adapters on the upper half."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=_LAYERS, **sizes))
    quantize_(model.model, Int8WeightOnlyConfig())
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[*range(_LAYERS // 2, _LAYERS)])
    return get_peft_model(model, adapters).train()  # type: ignore[arg-type]


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (4, 32))
    return {"input_ids": ids, "labels": ids}


def test_frozen_layers_below_the_first_adapter_cost_nothing() -> None:
    model, given = quantised(), batch()
    expected = gradients_of(model, **given)
    model.compile(backend="remat", options={"budget": 0.7, "compiler": "eager"})
    assert_close_gradients(gradients_of(model, **given), expected, 1e-6)
    (graph,) = remat.plans(model)
    assert graph.plan.dropped
    activations = [a for block in graph.plan.blocks for a in block.activations]
    frozen = [a for a in activations if any(f"layers.{i}." in f"{a.module}." for i in range(_LAYERS // 2))]
    assert len(frozen) < len(activations) / 4
    assert not [a for a in frozen if a.decision is remat.Decision.RECOMPUTE]
    assert sum(a.bytes for a in frozen) <= given["input_ids"].numel() * 32 * 4  # what the first adapter reads


def test_in_place_it_is_refused_with_the_way_out() -> None:
    model = remat.enable(quantised(), 0.7)
    with pytest.raises(remat.CaptureError, match=r'Int8Tensor.*torch\.compile\(model, backend="remat"'):
        model(**batch())
