"""Planning for devices that are not there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import remat
from remat.absent import LIBRARY_BYTES
from remat.devices import CPU, DEVICES, _known_gpu, device_profile, profile_of
from tests.models import build, mlp

LENGTH = 2048


def wide_llama(layers: int, where: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama in bfloat16 whose parameters would take gigabytes."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = transformers.LlamaConfig(vocab_size=1000, use_cache=False, **shape)
    with torch.device(where):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def test_a_model_on_meta_is_planned_and_nothing_allocated() -> None:
    model, kwargs = wide_llama(4, "meta")
    parameters = sum(p.nbytes for p in model.parameters())
    plans: list[remat.Plan] = []
    taken = remat.measure(lambda: plans.append(remat.plan(model, (), kwargs, budget=0.8, device="h100")))
    (plan,) = plans
    assert taken.peak_bytes - taken.resident_bytes < parameters // 50
    assert plan.device == "h100"
    assert plan.resident_bytes > parameters
    assert plan.peak_bytes <= (plan.budget_bytes or 0)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_fused_attention_saves_its_output_and_no_square() -> None:
    model, kwargs = wide_llama(2, "meta")
    plan = remat.plan(model, (), kwargs, budget=None, device="a100-80gb")
    activations = [a for block in plan.blocks for a in block.activations if "attention" in a.op]
    assert len(activations) == 4  # output and log-sum-exp, twice
    assert max(a.bytes for a in activations) == LENGTH * 2048 * 2
    assert plan.resident_bytes > LIBRARY_BYTES


def test_what_the_cuda_allocator_takes() -> None:
    mib = 2**20
    sizes = (1, 512, 513, 3 * mib + 1, 31 * mib, 31 * mib - 1, 31 * mib - 512, 32 * mib, 33 * mib - 512)
    taken = (512, 512, 1024, 3 * mib + 512, 32 * mib, 32 * mib, 31 * mib - 512, 32 * mib, 33 * mib - 512)
    assert tuple(DEVICES["h100"].allocated_bytes(size) for size in sizes) == taken
    assert DEVICES["cpu"].allocated_bytes(513) == 513
    assert [DEVICES["h100"].slack_bytes(size) - 4096 for size in (0, mib, 2 * mib, 2**30)] == [0, 0, 2 * mib, 8 * mib]
    assert DEVICES["cpu"].slack_bytes(2**30) == 4096


def test_the_same_plan_wherever_the_model_is() -> None:
    model, kwargs = build("llama")
    here = remat.frontier(model, (), kwargs, device="h200", points=2)[-1]
    far = {name: tensor.to("meta") for name, tensor in kwargs.items()}
    there = remat.frontier(model.to("meta"), (), far, device="h200", points=2)[-1]
    assert here.decisions == there.decisions
    assert (here.peak_bytes, here.step_us) == (there.peak_bytes, there.step_us)


@pytest.mark.slow
def test_what_a_device_can_do_counts() -> None:
    model, kwargs = wide_llama(4, "meta")
    fast, slow = (remat.plan(model, (), kwargs, budget=None, device=name) for name in ("h100", "l4"))
    assert slow.step_us > 5 * fast.step_us
    offloaded = remat.plan(model, (), kwargs, budget=0.8, device="l4")
    assert offloaded.host_bytes > 0  # slow arithmetic and a fast link
    assert offloaded.recompute_us + offloaded.stall_us < 0.01 * offloaded.step_us


def test_shares_are_of_that_devices_memory() -> None:
    model, kwargs = wide_llama(1, "meta")
    half = remat.plan(model, (), kwargs, budget="50%", device="rtx4090").budget_bytes
    free = remat.plan(model, (), kwargs, budget="auto", device="rtx4090").budget_bytes
    assert (half, free) == (DEVICES["rtx4090"].memory_bytes // 2, DEVICES["rtx4090"].memory_bytes)


def test_shares_of_the_host_are_of_that_devices() -> None:
    model, kwargs = wide_llama(1, "meta")
    with pytest.raises(remat.HostBudgetError) as error:
        remat.plan(model, (), kwargs, budget=None, device="rtx4090", host_budget="0.5%", policy="offload-all")
    assert error.value.budget_bytes == int(0.005 * DEVICES["rtx4090"].memory_bytes)


def test_tensors_that_are_attributes_come_along() -> None:
    """Those that a forward has computed cannot be copied; those on meta would be on another device than the rest."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(8, 8), torch.ones(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * self.scale).sum()

    with torch.device("meta"):
        there, x = Scaled(), torch.zeros(2, 8)
    computed = Scaled()
    computed.scale = computed.linear.bias * 2
    for model, inputs in ((there, x), (computed, torch.zeros(2, 8))):
        assert remat.plan(model, (inputs,), budget=None, device="h100").peak_bytes > 0


def test_the_optimizers_state_counts() -> None:
    model, kwargs = wide_llama(1, "meta")
    bare = remat.plan(model, (), kwargs, budget=None, device="h100")
    with_state = remat.plan(model, (), kwargs, budget=None, device="h100", optimizer=torch.optim.AdamW(model.parameters()))
    assert with_state.resident_bytes - bare.resident_bytes >= 2 * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("device", ["h1000", "", "cuda:0", 3])
def test_an_unknown_device_lists_the_known_ones(device: object) -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match=r"a100-40gb, a100-80gb, h100, h200, l4, rtx3090, rtx4090, rtx5090, cpu"):
        remat.plan(model, (x,), budget=None, device=device)  # type: ignore[arg-type]


def test_names_are_read_as_people_write_them() -> None:
    assert device_profile("RTX 4090") is DEVICES["rtx4090"]
    assert device_profile("H100") is DEVICES["h100"]


@pytest.mark.parametrize(
    ("full_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 3080", None),
    ],
)
def test_gpus_are_known_by_the_drivers_name(full_name: str, name: str | None) -> None:
    found = _known_gpu(full_name)
    assert (found.name if found is not None else None) == name
    assert found is None or found.is_here


def test_a_measured_device_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    assert profile_of(cpu) is CPU
    measured = remat.profile_device()
    assert measured.float_flop_per_us > 0
    assert measured.link.in_bytes_per_us > 0
    assert profile_of(cpu) == measured
    assert remat.profile_device("cpu") == measured
    with pytest.raises(remat.RematError, match="cannot be measured"):
        remat.profile_device("meta")


def test_figures_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "remat"):
        assert remat.profile_device("cpu").float_flop_per_us > 0
    assert "measured figures cannot be kept" in caplog.text
