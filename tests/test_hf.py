"""A budget in place, in a Trainer, and with PEFT; loss curves beside the plain model's."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import remat
from remat import disable, enable, plan_of
from remat.hf import RematCallback
from tests.steps import assert_close_gradients, gradients_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

_TOKENS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 128, (64, 32), generator=torch.Generator())]


def tiny(layers: int = 2, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = {"attention_dropout": 0.1, "num_hidden_layers": layers, **sizes, **config}
    return LlamaForCausalLM(LlamaConfig(**config)).train()


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in _TOKENS[:rows]])
    return {"input_ids": ids, "labels": ids}


def trainer(model: Any, folder: Path, callbacks: Any = (), kind: type[Trainer] = Trainer, **arguments: Any) -> Trainer:
    given = {"max_steps": 100, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no", **arguments}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    settings = TrainingArguments(str(folder), **given, **quiet)
    return kind(model, settings, train_dataset=_TOKENS, eval_dataset=_TOKENS[:8], callbacks=[*callbacks])


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2, "max_steps": 20}], ids=["steps", "accumulating"])
def test_a_trainers_loss_curve_is_the_plain_models(tmp_path: Path, arguments: dict[str, Any]) -> None:
    plain = trainer(tiny(), tmp_path, **arguments)
    plain.train()
    callback = RematCallback(budget=0.6)
    ours = trainer(tiny(), tmp_path, [callback], **arguments)
    ours.train()
    assert callback.plan is not None
    assert callback.plan.dropped
    assert callback.plan.at_peak()["optimizer"] > 0
    assert losses(ours) == losses(plain)
    assert losses(ours)[-1] < losses(ours)[0]


class _Measured(Trainer):
    """Notes the peak of the latest step but the first, in which scratch memory is measured."""

    peak_bytes = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = functools.partial(super().training_step, *args, **kwargs)
        if not self.state.global_step:
            return step()
        found: list[torch.Tensor] = []
        self.peak_bytes = remat.measure(lambda: found.append(step())).peak_bytes
        return found[0]


def test_a_trainers_step_stays_within_the_plan_and_holds_no_logits(tmp_path: Path) -> None:
    callback = RematCallback(budget=0.9)
    run: Any = trainer(tiny(vocab_size=2048), tmp_path, [callback], kind=_Measured, max_steps=3)
    run.train()
    plan = callback.plan
    assert plan is not None
    assert not plan.holds_outputs
    measured = run.peak_bytes - _TOKENS[0]["input_ids"].untyped_storage().nbytes()  # the data set is no part of the step
    assert 0.99 * plan.peak_bytes <= measured <= plan.peak_bytes


def test_bf16_and_evaluation_in_between(tmp_path: Path) -> None:
    arguments = {"bf16": True, "max_steps": 12, "eval_strategy": "steps", "eval_steps": 5}
    curves, evaluated = [], []
    for callbacks in ([], [RematCallback(budget=0.6)]):
        run = trainer(tiny(), tmp_path, callbacks, **arguments)
        run.train()
        curves.append(losses(run))
        evaluated.append([entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-2)


@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_model_in_a_trainer(tmp_path: Path) -> None:
    plain = trainer(tiny(attention_dropout=0.0), tmp_path, max_steps=5)
    plain.train()
    model = tiny(attention_dropout=0.0)
    model.compile(backend="remat", options={"budget": 0.8, "compiler": "eager"})
    ours = trainer(model, tmp_path, max_steps=5)
    ours.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)
    assert list(ours.model.state_dict()) == list(plain.model.state_dict())


def test_the_backend_of_training_arguments_is_not_ours_to_add(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="REMAT"):  # accelerate's list of backends; docs/trainers.md says what works
        trainer(tiny(), tmp_path, torch_compile_backend="remat")


class _OwnLoss(Trainer):
    """Replaces the model's forward by one that calls the backbone and computes the loss, as trl's SFTTrainer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        original: Any = type(self.model).forward

        @functools.wraps(original)
        def forward(model: Any, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
            return {"loss": nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels[:, 1:].flatten())}

        self.model.forward = types.MethodType(forward, self.model)


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    plain = trainer(tiny(), tmp_path, kind=_OwnLoss, max_steps=10)
    plain.train()
    callback = RematCallback(budget=0.6)
    ours = trainer(tiny(), tmp_path, [callback], kind=_OwnLoss, max_steps=10)
    ours.train()
    assert losses(ours) == losses(plain)
    assert callback.plan is not None
    assert callback.plan.model == "LlamaModel"
    assert callback.plan.dropped


def test_a_step_around_an_enabled_model_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trainer that calls the backbone never calls what was enabled."""
    model = copy.deepcopy(remat.enable(tiny(1), 0.8))
    with caplog.at_level(logging.WARNING, "remat"):
        model(**batch()).loss.backward()
        model.eval()(**batch())
        model.model(batch()["input_ids"])
    assert "ran by itself" not in caplog.text
    with caplog.at_level(logging.WARNING, "remat"):
        trainer(model, tmp_path, kind=_OwnLoss, max_steps=2).train()
    assert caplog.text.count("LlamaModel ran by itself in training, within no budget") == 1
    remat.disable(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_a_run_resumes_where_it_was_killed(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Kill(RematCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 13:
                raise Killed

    whole = trainer(tiny(), tmp_path / "whole", [RematCallback(budget=0.6)], max_steps=20)
    whole.train()
    arguments = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    with pytest.raises(Killed):
        trainer(tiny(), tmp_path / "killed", [Kill(budget=0.6)], **arguments).train()
    resumed = trainer(tiny(), tmp_path / "killed", [RematCallback(budget=0.6)], **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[-10:] == losses(whole)[-10:]


def test_the_model_stays_what_it_was(tmp_path: Path) -> None:
    model = tiny()
    signature, keys = inspect.signature(model.forward), list(model.state_dict())
    assert enable(model, 0.6) is model
    assert isinstance(model, PreTrainedModel)
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    assert plan_of(model) is None
    model(**batch()).loss.backward()
    assert plan_of(model).dropped  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    model.eval()
    ids = batch()["input_ids"][:1]
    expected = again.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    assert "forward" not in disable(model).__dict__


def test_a_copy_trains_by_itself() -> None:
    model = enable(tiny(attention_dropout=0.0), 0.6)
    model(**batch()).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    with torch.no_grad():
        next(twin.parameters()).mul_(2)
    expected = gradients_of(disable(copy.deepcopy(twin)), **batch())
    assert_close_gradients(gradients_of(twin, **batch()), expected, 1e-6)


def test_hooks_run_once() -> None:
    model, seen = enable(tiny(), 0.6), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model(**batch()).loss.backward()
    assert seen == ["model"]


def lora_on_the_top_half(model: nn.Module, layers: int) -> Any:
    targets = [f"model.layers.{i}.self_attn.{name}" for i in range(layers // 2, layers) for name in ("q_proj", "v_proj")]
    return get_peft_model(model, LoraConfig(target_modules=targets, lora_dropout=0.1))  # type: ignore[arg-type]


def saved_bytes(model: nn.Module) -> int:
    """Of what autograd keeps for backward that is not a parameter, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch()).loss
    del loss
    return sum(found.values())


@pytest.mark.slow
def test_frozen_layers_below_the_first_adapter_cost_nothing() -> None:
    layers = 4
    plain = saved_bytes(lora_on_the_top_half(tiny(layers), layers))
    model = lora_on_the_top_half(tiny(layers), layers)
    enable(model, 0.6)
    model(**batch()).loss.backward()
    plan = plan_of(model)
    assert plan is not None
    assert plan.dropped
    assert plan.saved_bytes < plain
    frozen = tuple(f"model.layers.{i}." for i in range(layers // 2))
    below = [a for block in plan.blocks for a in block.activations if f"{a.module}.".startswith(frozen)]
    assert not [a for a in below if a.decision is remat.Decision.RECOMPUTE]
    assert sum(a.bytes for a in below) <= batch()["input_ids"].numel() * 32 * 4  # what the first adapter reads
    again = [moment.module for moment in plan.timeline if moment.phase == "recompute"]
    assert again
    assert not [module for module in again if f"{module}.".startswith(frozen)]
    disable(model)
    enable(model, None)
    model(**batch()).loss.backward()
    assert plan_of(model).saved_bytes <= plain  # type: ignore[union-attr]


_ADAPTERS = {
    "dora": LoraConfig(use_dora=True, target_modules=["q_proj"]),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=8, target_r=4),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", _ADAPTERS)
def test_other_adapters(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny(attention_dropout=0.0), _ADAPTERS[kind]).train()
    expected = gradients_of(model, **batch())
    enable(model, 0.8)
    assert_close_gradients(gradients_of(model, **batch()), expected, 1e-6)
    assert plan_of(model) is not None
    assert ("runs code of its own around LlamaForCausalLM" in caplog.text) == (kind == "adalora")


def test_a_budget_too_small_stops_the_trainer_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tiny(), tmp_path, [RematCallback(budget=100_000)])
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(remat.BudgetError, match="smallest"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing", "torch_compile"])
def test_two_mechanisms_at_once_are_refused(tmp_path: Path, name: str) -> None:
    shown = name.replace("gradient", "activation")  # which is what transformers makes of the older name
    with pytest.raises(remat.RematError, match=f"{shown}=True"):
        trainer(tiny(), tmp_path, [RematCallback()], **{name: True})


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(remat.RematError, match="with 2 GPUs in one process"):
        trainer(tiny(), tmp_path, [RematCallback()])


def test_a_model_that_checkpoints_is_refused() -> None:
    model = tiny()
    model.activation_checkpointing_enable()
    with pytest.raises(remat.RematError, match=r"model\.activation_checkpointing_disable\(\)"):
        enable(model, 0.6)


def test_what_is_enabled_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(remat.RematError, match="enabled for this LlamaForCausalLM already"):
        trainer(tiny(), tmp_path, [RematCallback(), RematCallback()])
    with pytest.raises(remat.RematError, match="is not enabled"):
        disable(tiny())
    run = trainer(tiny(), tmp_path)
    run.add_callback(RematCallback())
    with pytest.raises(remat.RematError, match="callbacks="):
        run.train()


def test_a_model_that_was_replaced_is_refused(tmp_path: Path) -> None:
    run = trainer(tiny(), tmp_path, [RematCallback()])
    run.model = tiny()
    with pytest.raises(remat.RematError, match="not the one"):
        run.train()


def test_modules_that_were_replaced_are_refused() -> None:
    model = enable(tiny(), 0.6)
    wrapped = lora_on_the_top_half(model, 2)
    with pytest.raises(remat.RematError, match="added or replaced"):
        wrapped(**batch())


def test_a_forward_that_was_wrapped_already_is_refused() -> None:
    model = tiny()
    model.forward = model.forward
    with pytest.raises(remat.RematError, match=r"before accelerator\.prepare"):
        enable(model, 0.6)


def test_a_forced_cache_is_refused() -> None:
    with pytest.raises(remat.RematError, match="use_cache=True"):
        enable(tiny(), 0.6)(**batch(), use_cache=True)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(remat.RematError, match="'polcy'"):
        enable(tiny(), 0.6, polcy="blocks")
