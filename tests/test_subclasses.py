"""Weights that are no plain tensors: quantised ones, wrapper subclasses, DTensor; and values that lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import remat

SETTINGS = ({"policy": "blocks"}, {"policy": "offload"}, {"policy": "offload-all"}, {"budget": 0.85})


class Quantized(nn.Module):
    """A frozen 8-bit weight, and an adapter that trains (QLoRA)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 448
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).to(torch.float8_e4m3fn))
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.scale  # type: ignore[operator]
        return nn.functional.linear(x, weight) + self.up(self.down(x))


def layers() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1)) for _ in range(4)])


def quantized() -> tuple[nn.Module, torch.Tensor]:
    model = layers()
    for layer in model:
        layer[0] = Quantized(layer[0])  # type: ignore[index, operator]
    return model, torch.randn(64, 32)


def wrapped() -> tuple[nn.Module, torch.Tensor]:
    model = layers()
    for layer in model:
        weight = layer[0].weight.detach()  # type: ignore[index]
        layer[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))  # type: ignore[index]
    return model, torch.randn(64, 32)


def distributed() -> tuple[nn.Module, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = layers()
    distribute_module(model, mesh)
    return model, distribute_tensor(torch.randn(64, 32), mesh, [Replicate()])


@pytest.fixture
def _one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(call: nn.Module, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = call(x).square().mean()
    torch.rand(3)
    loss.backward()
    return [plain(p.grad).clone() for p in model.parameters() if p.grad is not None]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    for name in ("_local_tensor", "a"):
        tensor = getattr(tensor, name, tensor)
    return tensor


def assert_door_2_is_right(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    model, x = make()
    expected = gradients(model, model, x)
    assert len(expected) >= 8
    for settings in SETTINGS:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="remat", options={"compiler": "eager", **settings})
        found = gradients(compiled, model, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        plan = remat.plans(compiled)[0].plan
        assert (plan.host_bytes > 0) == str(settings.get("policy")).startswith("offload")
        assert plan.dropped or plan.host_bytes


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("make", [quantized, wrapped])
def test_door_2(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    assert_door_2_is_right(make)


@pytest.mark.usefixtures("_dynamo", "_one_process")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torch.distributed about itself
def test_distributed_tensors_through_door_2() -> None:
    assert_door_2_is_right(distributed)


def test_quantized_weights_through_door_1() -> None:
    model, x = quantized()
    expected = gradients(model, model, x)
    for settings in SETTINGS:
        module = remat.optimize(model, (x,), **{"budget": None, **settings})  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(gradients(module, model, x), expected, strict=True))


def test_door_1_says_which_weight_it_cannot_hold_and_what_can() -> None:
    model, x = wrapped()
    with pytest.raises(remat.CaptureError, match=r"0\.0\.weight is a TwoTensor.*torch\.compile\(model, backend=\"remat\""):
        remat.optimize(model, (x,), budget=None)
