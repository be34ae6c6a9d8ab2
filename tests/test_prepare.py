"""A model made ready for training, and undone again."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import remat
from tests.steps import assert_close_gradients, gradients_of


def half(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **config)).to(torch.bfloat16).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (4, 32))
    return {"input_ids": ids, "labels": ids}


def test_everything_is_done_and_undone() -> None:
    model, given = half(), batch()
    before = {name: (p.dtype, id(p)) for name, p in model.named_parameters()}
    expected = model(**given)
    found = remat.prepare_for_training(model, upcast_layernorm=True, upcast_lm_head_output=True, budget=0.6)
    assert [line.split()[0] for line in found.done] == ["remat:", "5", "logits", "use_cache", "inputs"]
    norms = {name for name, p in model.named_parameters() if p.dtype is torch.float32}
    assert norms == {name for name in before if "norm" in name}
    output = model(**given)
    assert output.logits.dtype is torch.float32
    assert output.past_key_values is None
    output.loss.backward()
    assert remat.plan_of(model) is not None
    assert model.config.use_cache is False
    assert found.undo() is model
    assert {name: (p.dtype, id(p)) for name, p in model.named_parameters()} == before
    assert all(p.grad.dtype is p.dtype for p in model.parameters() if p.grad is not None)
    assert model.config.use_cache is True
    again = model(**given)
    assert torch.equal(again.logits, expected.logits)
    assert again.logits.dtype is torch.bfloat16
    found.undo()  # nothing is left to do


def test_norms_compute_in_float() -> None:
    model = half()
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    norm = model.model.norm
    exact = norm.weight.float() * nn.functional.rms_norm(x.float(), (32,), eps=norm.variance_epsilon)
    remat.prepare_for_training(model, upcast_layernorm=True, budget=None)
    assert norm(x).dtype is torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())


def test_a_float_model_needs_no_upcast() -> None:
    model = half().float()
    found = remat.prepare_for_training(model, upcast_layernorm=True, budget=None)
    assert "0 norms compute in float32" in found.done
    assert not model.model.norm._forward_hooks


def test_inputs_of_an_adapter_need_no_gradient() -> None:
    model = get_peft_model(half().float(), LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    given = batch()
    expected = gradients_of(model, **given)
    remat.prepare_for_training(model, budget=0.8)
    assert_close_gradients(gradients_of(model, **given), expected, 1e-6)
    assert not model.get_input_embeddings()(given["input_ids"]).requires_grad


@pytest.mark.parametrize(("switch", "held"), [("unsloth", "host"), (True, "recompute"), (False, "neither")])
def test_unsloths_switch(switch: Any, held: str) -> None:
    model = half().float()
    remat.prepare_for_training(model, budget=None, use_gradient_checkpointing=switch)
    model(**batch()).loss.backward()
    plan = remat.plan_of(model)
    assert plan is not None
    assert (plan.host_bytes > 0) == (held == "host")
    assert (plan.recompute_us > 0) == (held != "neither")
    tight = half().float()
    remat.prepare_for_training(tight, budget=1000, use_gradient_checkpointing=switch)
    with pytest.raises(remat.BudgetError, match=r"policy='.*' needs"):
        tight(**batch())


def test_the_cache_is_turned_off_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "remat"):
        remat.prepare_for_training(half(), budget=None)
    assert [r.message for r in caplog.records if "use_cache" in r.message] == [
        "LlamaForCausalLM: use_cache is off, since training reads no key-value cache"
    ]
    model = half()
    assert remat.prepare_for_training(model, budget=None, use_cache=True).model.config.use_cache is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"use_gradient_checkpointing": True, "policy": "sqrt"}, "in two ways"),
        ({"use_gradient_checkpointing": "unslot"}, "'unsloth', True and False"),
        ({"policy": "sqr"}, "sqr"),
        ({"budget": "24 apples"}, "apples"),
        ({"colour": 1}, "'colour'"),
    ],
)
def test_arguments_that_mean_nothing_change_nothing(arguments: dict[str, Any], said: str) -> None:
    model = half()
    with pytest.raises(remat.RematError, match=said):
        remat.prepare_for_training(model, upcast_layernorm=True, **arguments)
    assert "forward" not in model.__dict__
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_without_a_head_has_no_logits_to_upcast() -> None:
    with pytest.raises(remat.RematError, match="no output embeddings"):
        remat.prepare_for_training(nn.Linear(2, 2), upcast_lm_head_output=True)
