"""What only an accelerator can show: allocator peaks against budgets, through both doors, and replayed device RNG."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import remat
from remat.backend import remat_backend
from remat.transfer import _StreamLane, host_tier

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _encoder() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False).cuda()
    return model.train(), torch.randn(8, 512, 512, device="cuda")


def _step(model: nn.Module, x: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    def step() -> None:
        torch.manual_seed(1)
        loss = model(x).square().mean()
        torch.rand(5, device="cuda")
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    peak = remat.measure(step).peak_bytes
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return peak, gradients


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_door_1_holds_its_budget(share: float) -> None:
    model, x = _encoder()
    _, expected = _step(remat.optimize(model, (x,), budget=None), x)
    module = remat.optimize(model, (x,), budget=share)
    peak, found = _step(module, x)
    assert module.plan is not None
    assert peak <= module.plan.budget_bytes
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_door_2_holds_its_budget(compiler: str) -> None:
    model, x = _encoder()
    options = {"budget": 0.7, "compiler": compiler}
    compiled = torch.compile(model, backend=remat_backend, options=options)
    peak, _ = _step(compiled, x)
    torch._dynamo.reset()
    baseline, _ = _step(torch.compile(model, backend=remat_backend, options={"compiler": compiler}), x)
    assert peak < baseline


@pytest.mark.parametrize("policy", ["offload", "offload-all"])
def test_values_on_the_host_change_nothing_and_free_the_device(policy: str) -> None:
    model, x = _encoder()
    most, expected = _step(remat.optimize(model, (x,), budget=None), x)
    module = remat.optimize(model, (x,), budget=None, policy=policy)
    peak, found = _step(module, x)
    assert module.plan is not None
    assert peak < most
    assert abs(module.plan.peak_bytes / peak - 1) <= 0.03
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_copies_that_take_their_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _encoder()
    _, expected = _step(remat.optimize(model, (x,), budget=None), x)
    module = remat.optimize(model, (x,), budget=0.5, host_budget="8GiB")
    assert module.plan is not None
    assert module.plan.host_bytes > 0
    monkeypatch.setattr(_StreamLane, "delay_s", 0.005)
    for _ in range(5):
        peak, found = _step(module, x)
        assert peak <= module.plan.budget_bytes
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_steps_leak_nothing_and_pin_no_new_memory() -> None:
    model, x = _encoder()
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")
    pool = host_tier(x.device).pool
    _step(module, x)
    made, allocated = pool.made, torch.cuda.memory_allocated()
    for _ in range(100):
        _step(module, x)
    assert (pool.made, pool.in_use_bytes, torch.cuda.memory_allocated()) == (made, 0, allocated)
