"""Models with autograd functions of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat.absent import LIBRARY_BYTES
from tests.steps import assert_same, run_step


class Scaled(torch.autograd.Function):
    """Several results, one without gradient and one that is no tensor, and a backward that no formula of torch's gives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, factor: float) -> Any:
        y = x * scale
        ctx.save_for_backward(x, scale)
        above = y > 0
        ctx.mark_non_differentiable(above)
        return y, 3, y * factor, above

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale = ctx.saved_tensors
        gradient = 1.5 * gradients[0] + gradients[2]
        return gradient * scale, (gradient * x).sum(0), None


class Holding(torch.autograd.Function):
    """Keeps what it is given where no hook sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.x.cos()


class Reversed(torch.autograd.Function):
    """Returns what it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


reverse = Reversed.apply  # as libraries name what they offer


class Dropping(torch.autograd.Function):
    """Draws random numbers, and needs much more memory than its result."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        kept = torch.rand_like(x) > 0.3
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.saved_tensors[0]


class Product(torch.autograd.Function):
    """Computes in the type that autocast says around it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return (gradient @ weight.t().to(gradient.dtype)).float(), (x.t().to(gradient.dtype) @ gradient).float()


class Powered(torch.autograd.Function):
    """Has defaults, and what it saves for backward is set apart from its forward."""

    @staticmethod
    def forward(x: torch.Tensor, power: int = 2, factor: float = 1.0) -> torch.Tensor:
        return factor * x**power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.power, ctx.factor = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * ctx.factor * ctx.power * x ** (ctx.power - 1), None, None


class Doubling(torch.autograd.Function):
    """Writes to what it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class First(torch.autograd.Function):
    """Takes tensors in a list."""

    @staticmethod
    def forward(ctx: Any, xs: list[torch.Tensor]) -> torch.Tensor:
        return xs[0] * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


class Counting(torch.autograd.Function):
    """Writes to a tensor that it is not given."""

    calls = torch.zeros(())

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Reaching(torch.autograd.Function):
    """Reads a parameter that it is not given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: Block) -> torch.Tensor:
        return x * block.scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class Dequantising(torch.autograd.Function):
    """Reads the scales of a quantised weight from an object, as those of bitsandbytes do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        ctx.weight, ctx.scales = weight, scales
        return x @ (weight * scales.of_rows[:, None])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ (ctx.weight * ctx.scales.of_rows[:, None]).t(), None, None


class Scales:
    def __init__(self, of_rows: torch.Tensor) -> None:
        self.of_rows = of_rows


class Weight(nn.Parameter):
    scales: Scales

    def __deepcopy__(self, memo: Any) -> Weight:
        return _weight(self.data.clone(), copy.deepcopy(self.scales, memo))

    def __reduce_ex__(self, _: Any) -> Any:
        return _weight, (self.data, self.scales)


def _weight(data: torch.Tensor, scales: Scales) -> Weight:
    weight = Weight(data, requires_grad=False)
    weight.scales = scales
    return weight


class Quantised(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = _weight(torch.empty(features, features, dtype=torch.int8), Scales(torch.empty(features)))
        self.fill()

    def fill(self) -> None:
        self.weight.data.random_(-128, 128)
        self.weight.scales = Scales(torch.rand(len(self.weight)) / 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Dequantising.apply(x, self.weight, self.weight.scales)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.dropout = nn.Linear(64, 256), nn.Linear(256, 64), nn.Dropout(0.1)
        self.scale, self.mixed = nn.Parameter(torch.randn(256)), nn.Parameter(torch.randn(256, 256) / 16)
        self.quantised = Quantised(256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.second(self._between(self.first(x))))

    def _between(self, x: torch.Tensor) -> Any:
        match self.kind:
            case "scaled":
                y, three, z, above = Scaled.apply(x, self.scale, 0.5)
                return y.tanh() * three + z * above
            case "product":
                with torch.autocast("cpu", torch.bfloat16):
                    return Product.apply(x, self.mixed).tanh().float()
            case "reversed":
                return reverse(x).tanh()
            case "powered":
                return Powered.apply(x, 3).tanh()
            case "holding":
                return Holding.apply(x)
            case "dropping":
                return Dropping.apply(x).tanh()
            case "doubling":
                return Doubling.apply(x.clone())
            case "counting":
                return Counting.apply(x)
            case "reaching":
                return Reaching.apply(x, self)
            case "quantised":
                return self.quantised(x).tanh()
        return First.apply([x])


def _model(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(kind) for _ in range(3))), {"input": torch.randn(512, 64)}


@pytest.mark.parametrize("kind", ["scaled", "holding", "reversed", "dropping", "product", "powered", "quantised"])
def test_functions_of_a_model_are_run_again_like_ops(kind: str) -> None:
    model, kwargs = _model(kind)
    plain = run_step(copy.deepcopy(model), kwargs)
    with pytest.raises(remat.BudgetError) as error:
        remat.optimize(model, (), kwargs, budget=1)
    module = remat.optimize(model, (), kwargs, budget=error.value.minimum_bytes)
    ours = run_step(module, kwargs)
    assert_same(ours, plain)
    assert len(module.plan.dropped) > 3
    assert 0.99 < ours.peak_bytes / module.plan.peak_bytes <= 1
    assert_same(run_step(copy.deepcopy(module), kwargs), plain)
    assert_same(run_step(pickle.loads(pickle.dumps(module)), kwargs), plain)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_quantised_anew(whole: bool) -> None:
    model, kwargs = _model("quantised")
    original = copy.deepcopy(model)
    remat.enable(model, 0.8, whole_model=whole)
    assert_same(run_step(model, kwargs), run_step(original, kwargs))
    before = remat.plan_of(model)
    model.zero_grad()
    original.zero_grad()
    for module, other in zip(model.modules(), original.modules(), strict=True):
        if isinstance(module, Quantised) and isinstance(other, Quantised):
            module.fill()
            other.weight.data.copy_(module.weight)
            other.weight.scales = module.weight.scales
    ours = run_step(model, kwargs)
    assert_same(ours, run_step(original, kwargs))
    assert before is not None
    assert 0.99 < ours.peak_bytes / before.peak_bytes <= 1


def test_what_functions_read_of_objects_is_resident() -> None:
    model, kwargs = _model("quantised")
    scales = [module.weight.scales.of_rows for module in model.modules() if isinstance(module, Quantised)]
    there = sum(tensor.nbytes for tensor in (*model.parameters(), *kwargs.values(), *scales))
    assert remat.plan(model, (), kwargs, budget=None).resident_bytes == there
    assert remat.plan(model, (), kwargs, budget=None, device="h100").resident_bytes == there + LIBRARY_BYTES


def test_functions_of_a_model_that_is_compiled() -> None:
    model, kwargs = _model("dropping")
    plain = run_step(copy.deepcopy(model), kwargs)
    module = remat.optimize(model, (), kwargs, budget="4MiB")
    assert_same(run_step(torch.compile(module, backend="aot_eager"), kwargs), plain)


class Gathering(torch.autograd.Function):
    """Writes into zeros of its own, out of place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x[:, :4].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        columns = torch.zeros(len(gradient), 4, dtype=torch.long)
        return torch.zeros(len(gradient), 256).scatter_add(1, columns, gradient)


class Picking(nn.Module):
    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.first, self.pick = nn.Linear(8, 256), pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pick(self.first(x)).square().mean()


@pytest.mark.parametrize(
    "pick",
    [
        lambda x: x.gather(1, torch.zeros(2048, 4, dtype=torch.long)),
        lambda x: x[torch.tensor([0, 1, 1])],
        lambda x: x.index_select(0, torch.tensor([1, 1])),
        lambda x: x.max(1).values,
        Gathering.apply,
    ],
    ids=["gather", "index", "index_select", "max", "of the model's own"],
)
def test_backward_into_zeros(pick: Any) -> None:
    model, kwargs = Picking(pick), {"x": torch.randn(2048, 8)}
    plan = remat.plan(model, (), kwargs, budget=None)
    assert 0.99 < run_step(model, kwargs).peak_bytes / plan.peak_bytes <= 1


def test_functions_within_blocks() -> None:
    model, kwargs = _model("scaled")
    plain = run_step(copy.deepcopy(model), kwargs)
    remat.optimize_blocks(model, (), kwargs, budget=None, policy="blocks")
    ours, plan = run_step(model, kwargs), remat.plan_of(model)
    assert_same(ours, plain)
    assert plan is not None
    assert any("scaled" in name for name in plan.dropped)
    assert 0.97 < ours.peak_bytes / plan.peak_bytes <= 1


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("doubling", r"writes to a tensor that it is given \(.*Doubling\)"),
        ("list", r"takes tensors within another argument \(.*First\)"),
        ("counting", r"writes to a tensor that is not given to it \(.*Counting\)"),
        ("reaching", r"reads a parameter, buffer or result that is not given to it \(.*Reaching\)"),
    ],
)
def test_functions_that_cannot_be_ops_are_refused(kind: str, why: str) -> None:
    model, kwargs = _model(kind)
    with pytest.raises(remat.CaptureError, match=why):
        remat.optimize(model, (), kwargs, budget=None)
    x = torch.full((3,), 0.4, requires_grad=True)
    Reversed.apply(x).sum().backward()
    assert torch.equal(x.grad, -torch.ones(3))
