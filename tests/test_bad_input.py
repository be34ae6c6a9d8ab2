"""Everything a person can get wrong: each works, or gives a clear error at the call, never a wrong number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat import budget as budgets
from tests.models import Mlp, llama, mlp, smallest_budget
from tests.steps import assert_close_gradients, assert_same_gradients, gradients_of

UNREADABLE = [
    0,
    -1,
    math.nan,
    math.inf,
    0.0,
    -0.5,
    1.5,
    "8 potatoes",
    "",
    "GiB",
    "-3GiB",
    "0%",
    "0 B",
    True,
    False,
    [1],
    b"1GiB",
    10**30,
    f"1{'0' * 400}GiB",
]


def smallest(**shape: Any) -> tuple[nn.Module, torch.Tensor, nn.Module]:
    """(original, input, rewritten at the smallest budget)."""
    model, x = mlp(**shape)
    return model, x, remat.optimize(model, (x,), budget=smallest_budget(**shape))


# ---- budgets ----


@pytest.mark.parametrize("budget", UNREADABLE, ids=repr)
def test_unreadable_budgets_are_refused_at_the_call(budget: Any) -> None:
    model, x = mlp()
    with pytest.raises(remat.BudgetError, match="use bytes as an int"):
        remat.optimize(model, (x,), budget=budget)
    with pytest.raises(remat.BudgetError):
        remat.optimize(model, budget=budget)


def test_budget_is_required() -> None:
    model, x = mlp()
    with pytest.raises(TypeError, match="budget"):
        remat.optimize(model, (x,))  # type: ignore[call-arg]


def test_a_budget_larger_than_the_device_is_allowed_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "_said", set())
    model, x = mlp()
    with caplog.at_level(logging.WARNING, logger="remat"):
        for _ in range(2):
            remat.optimize(model, (x,), budget="100TiB")
    assert len([r for r in caplog.records if "larger than" in r.getMessage()]) == 1


def test_a_budget_nobody_can_meet_names_the_smallest_that_works() -> None:
    model, x = mlp()
    with pytest.raises(remat.BudgetError) as caught:
        remat.optimize(model, (x,), budget=1000)
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.budget_bytes == 1000
    assert error.minimum_bytes is not None
    assert error.where
    assert error.where in str(error).replace(", at ", " at ")
    assert str(error.minimum_bytes) in str(error)
    assert remat.optimize(model, (x,), budget=error.minimum_bytes).plan.peak_bytes <= error.minimum_bytes  # type: ignore[union-attr]
    with pytest.raises(remat.BudgetError):
        remat.optimize(model, (x,), budget=int(0.99 * error.minimum_bytes))


@pytest.mark.parametrize("shape", [{"width": 64, "layers": 2, "rows": 1024}, {"width": 128, "layers": 3, "rows": 2048}])
def test_what_a_plan_for_the_smallest_budget_needs_is_enough(shape: dict[str, int]) -> None:
    model, x = mlp(dropout=0.0, **shape)
    with pytest.raises(remat.BudgetError) as caught:
        remat.plan(model, (x,), budget=1)
    assert caught.value.minimum_bytes is not None
    peak = remat.plan(model, (x,), budget=caught.value.minimum_bytes).peak_bytes
    assert remat.plan(model, (x,), budget=peak).peak_bytes <= peak


def test_policy_is_checked() -> None:
    with pytest.raises(remat.RematError, match="'auto'"):
        remat.optimize(mlp()[0], budget=None, policy="fast")


# ---- models ----


def test_a_model_on_several_devices() -> None:
    model, x = mlp()
    model.layers[1].to("meta")
    with pytest.raises(remat.CaptureError, match=r"several devices.*cpu.*meta"):
        remat.optimize(model, (x,), budget=None)


def test_a_model_with_nothing_to_train() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match="requires grad"):
        remat.optimize(model.requires_grad_(False), (x,), budget=None)


class Named(nn.Module):
    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name = name
        if kind == "buffer":
            self.register_buffer(name, torch.ones(4))
        else:
            setattr(self, name, nn.Linear(4, 4) if kind == "module" else nn.Parameter(torch.ones(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = getattr(self, self.name)
        return (part(x) if isinstance(part, nn.Module) else x * part).sum()


@pytest.mark.parametrize("kind", ["parameter", "buffer", "module"])
@pytest.mark.parametrize("name", ["code", "graph", "plan", "capture", "_gate", "region_0"])
def test_names_that_graphs_use_themselves_are_refused_unless_they_are_of_a_part(name: str, kind: str) -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(remat.RematError, match=rf"{name}.*rename it"):
        remat.optimize(Named(name, kind).train(), (x,), budget=None)
    remat.optimize(nn.Sequential(Named(name, kind)).train(), (x,), budget=None)(x).backward()


def test_names_that_only_begin_as_regions_do() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    remat.optimize(Named("region_embed", "module").train(), (x,), budget=None)(x).backward()


def test_a_model_in_eval_mode() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match=r"model\.train\(\)"):
        remat.optimize(model.eval(), (x,), budget=None)


class Branching(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if super().forward(x) > 0:  # the line that cannot be captured
            x = x * 2
        return super().forward(x)


def test_data_dependent_control_flow_names_the_line_and_door_2() -> None:
    with pytest.raises(remat.CaptureError) as caught:
        remat.optimize(Branching().train(), (torch.randn(8, 32),), budget=None)
    message = str(caught.value)
    assert "test_bad_input.py" in message
    assert "the line that cannot be captured" in message
    assert 'backend="remat"' in message


class CheckpointsItself(Mlp):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_itself_is_told_how_to_turn_it_off(reentrant: bool) -> None:
    model = CheckpointsItself().train()
    model.reentrant = reentrant
    with pytest.raises(remat.CaptureError, match="checkpointing_disable"):
        remat.optimize(model, (torch.randn(8, 32, requires_grad=True),), budget=None)


def _switch_checkpointing(model: nn.Module, which: str) -> None:
    """transformers renames gradient_checkpointing_* to activation_checkpointing_* in 5.x."""
    names = (f"{kind}_checkpointing_{which}" for kind in ("activation", "gradient"))
    next(getattr(model, name) for name in names if hasattr(model, name))()


def test_transformers_gradient_checkpointing_is_detected() -> None:
    model, kwargs = llama(layers=1)
    model.train()
    _switch_checkpointing(model, "enable")
    with pytest.raises(remat.CaptureError, match="checkpointing_disable"):
        remat.optimize(model, (), kwargs, budget=None)
    _switch_checkpointing(model, "disable")
    remat.optimize(model, (), kwargs, budget=None)


class Raising(Mlp):
    broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise ValueError("broken on purpose")
        return super().forward(x)


def test_an_exception_inside_forward_leaves_everything_usable() -> None:
    model, x = Raising().train(), torch.randn(16, 32)
    expected = gradients_of(model, x)
    module = remat.optimize(model, budget=None)  # captures at the first call
    model.broken = True
    with pytest.raises((ValueError, remat.CaptureError), match="broken on purpose"):
        module(x)
    model.broken = False
    module(x)
    assert_same_gradients(gradients_of(module, x), expected)
    with pytest.raises(remat.CaptureError, match="31"):
        module(torch.randn(16, 31))
    assert_same_gradients(gradients_of(module, x), expected)


# ---- what a step may do with the graph ----


def test_retain_graph_gives_the_same_gradients_twice() -> None:
    _, x, module = smallest()
    torch.manual_seed(1)
    loss = module(x)
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    torch.rand(3)
    loss.backward()
    assert_same_gradients({n: p.grad for n, p in module.named_parameters()}, first)


def test_what_is_computed_again_does_not_stay_for_a_second_backward() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(8)))
    optimized = remat.optimize(model, (torch.randn(512, 32),), budget=0.4, loss=torch.Tensor.sum)
    plan, x = optimized.plan, torch.randn(512, 32)
    assert plan is not None

    def twice() -> None:
        loss = optimized(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    twice()
    optimized.zero_grad(set_to_none=True)
    assert remat.measure(twice).peak_bytes <= plan.peak_bytes + plan.saved_bytes  # which autograd does not let go of
    assert plan.peak_bytes + plan.saved_bytes < 0.8 * plan.baseline_peak_bytes


def test_backward_twice_without_retain_raises_as_torch_does() -> None:
    _, x, module = smallest()
    loss = module(x)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def second_order(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a gradient penalty."""
    torch.manual_seed(1)
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x), x, create_graph=True)
    torch.rand(3)
    (slope.square().sum() * 1e4).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_double_backward_equals_the_original() -> None:
    model, x = mlp()
    budget = remat.frontier(model, (x.clone().requires_grad_(),), points=2)[-1].peak_bytes
    module = remat.optimize(model, (x.requires_grad_(),), budget=budget)
    assert module.plan.dropped  # type: ignore[union-attr]
    assert_close_gradients(second_order(module, x), second_order(model, x), 1e-5)


def hessian_times_ones(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Second derivatives with respect to the parameters, through dropped values and what they are recomputed from."""
    torch.manual_seed(1)
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(x), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(g.sum() for g in first), parameters, allow_unused=True))


def test_second_derivatives_of_parameters_equal_the_original() -> None:
    model, x, module = smallest(dropout=0.0)
    for a, b in zip(hessian_times_ones(module, x), hessian_times_ones(model, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_partial_backward() -> None:
    model, x, module = smallest()
    torch.manual_seed(1)
    expected = torch.autograd.grad(model(x), [model.layers[2][1].weight, model.layers[0][3].bias])
    torch.manual_seed(1)
    loss = module(x)
    wanted = [module.layers[2][1].weight, module.layers[0][3].bias]
    (last,) = torch.autograd.grad(loss, wanted[:1], retain_graph=True)
    (first,) = torch.autograd.grad(loss, wanted[1:])
    assert torch.equal(last, expected[0])
    assert torch.equal(first, expected[1])


def test_a_graph_that_is_never_run_backward_is_freed() -> None:
    _, x, module = smallest()
    expected = gradients_of(module, x)
    for _ in range(3):
        module(x)
    assert_same_gradients(gradients_of(module, x), expected)


def test_two_forwards_then_two_backwards() -> None:
    model, x, module = smallest()
    y = torch.randn_like(x)

    def both(m: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        first, second = m(x), m(y)
        first.backward()
        second.backward()
        found = {n: p.grad for n, p in m.named_parameters()}
        m.zero_grad(set_to_none=True)
        return found

    assert_close_gradients(both(module), both(model), 1e-6)


def weight_changed(model: nn.Module, x: torch.Tensor) -> None:
    loss = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    loss.backward()


def test_a_parameter_changed_in_place_between_forward_and_backward_is_an_error() -> None:
    model, x, module = smallest()
    with pytest.raises(RuntimeError, match="modified"):
        weight_changed(model, x)
    with pytest.raises(RuntimeError, match="modified"):
        weight_changed(module, x)


def test_an_input_changed_in_place_between_forward_and_backward_is_an_error() -> None:
    _, x, module = smallest()
    loss = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_inference_mode_runs_the_original() -> None:
    model, x, module = smallest(dropout=0.0)
    with torch.inference_mode():
        assert torch.equal(module(x), model(x))
    gradients_of(module, x)


def test_an_inference_tensor_as_input_behaves_as_with_the_original() -> None:
    model, x, module = smallest()
    with torch.inference_mode():
        y = x.clone()
    expected = _outcome(lambda: gradients_of(model, y))
    found = _outcome(lambda: gradients_of(module, y))
    assert isinstance(expected, dict) == isinstance(found, dict)
    if isinstance(expected, dict) and isinstance(found, dict):
        assert_close_gradients(found, expected, 1e-6)


def test_an_inference_tensor_that_recompute_reads() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return self.last(nn.functional.gelu(self.first(x) + shift)).sum()

    model, x = Shifted(), torch.randn(4, 8)
    with torch.inference_mode():
        shift = torch.randn(32)
    expected = gradients_of(model, x, shift)
    module = remat.optimize(model, (x, shift), budget=None, policy=lambda _: remat.Decision.RECOMPUTE)
    assert_same_gradients(gradients_of(module, x, shift), expected)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, remat.RematError) as error:
        return error


# ---- torch.func ----


def functional_gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)


def test_func_grad_works_without_a_region() -> None:
    model, x = mlp(dropout=0.0)
    module = remat.optimize(model, (x,), budget=None)
    assert_close_gradients(functional_gradients(module, x), functional_gradients(model, x), 1e-6)


def test_func_grad_by_an_input_says_that_it_would_have_to_plan() -> None:
    model, x = mlp()
    module = remat.optimize(model, (x,), budget=None)
    with pytest.raises(remat.RematError, match=r"cannot be planned in a torch\.func transform"):
        torch.func.vjp(module, x)


def test_func_grad_says_no_to_a_region() -> None:
    _, x, module = smallest(dropout=0.0)
    with pytest.raises(remat.RematError, match=r"torch\.func"):
        functional_gradients(module, x)


def test_vmap_works_without_a_region() -> None:
    model, x = mlp(dropout=0.0)
    found = torch.func.vmap(remat.optimize(model, (x,), budget=None))(torch.stack([x, 2 * x]))
    assert torch.allclose(found, torch.stack([model(x), model(2 * x)]))


def test_vmap_says_no_to_a_region() -> None:
    _, x, module = smallest(dropout=0.0)
    with pytest.raises(remat.RematError, match=r"torch\.func"):
        torch.func.vmap(module)(torch.stack([x, 2 * x]))


def test_functional_call_uses_the_parameters_given() -> None:
    model, x, module = smallest(dropout=0.0)
    other = {n: (2 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    expected = torch.func.functional_call(model, other, (x,))
    wanted = torch.autograd.grad(expected, list(other.values()))
    found = torch.func.functional_call(module, other, (x,))
    assert torch.equal(found, expected)
    for a, b in zip(torch.autograd.grad(found, list(other.values())), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) / self.calls.add_(1)


def test_a_model_that_writes_to_a_tensor_that_is_no_buffer() -> None:
    with pytest.raises(remat.CaptureError, match=r'its attribute 0.calls.*register_buffer\("calls"'):
        remat.optimize(nn.Sequential(_Counts()), (torch.randn(4, 8),), budget=None)


@torch.library.custom_op("remat_tests::doubled", mutates_args=("x",))
def _doubled(x: torch.Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("remat_tests::several", mutates_args=())
def _several(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x + 1, [x.sin(), x * 2]


_several.register_fake(lambda x: (torch.empty_like(x), [torch.empty_like(x), torch.empty_like(x)]))
_several.register_autograd(lambda _, g, gs: g + gs[0] + 2 * gs[1], setup_context=lambda ctx, inputs, output: None)


class _Runs(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.embedding, self.what = nn.Embedding(4, 8, sparse=True), what

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(self, self.layers(x))


def _doubles(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.detach().clone()
    _doubled(y)
    return x * y


class _Box:
    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (_doubles, "auto_functionalized"),
        (lambda _, x: _several(x)[1][0], "a list among its results"),
        (lambda _, x: x.to_sparse().to_dense(), "layout torch.sparse_coo"),
        (lambda self, x: x * self.embedding(torch.tensor([1])), "layout torch.sparse_coo"),
        (lambda _, x: (x * 1).fill_diagonal_(0.0), "another derivative"),
    ],
    ids=["a custom op that writes", "a nested result", "sparse", "a sparse gradient", "as_strided_scatter"],
)
def test_what_a_graph_cannot_do_is_for_door_2(what: Any, said: str) -> None:
    with pytest.raises(remat.CaptureError, match=rf"{said}(.|\n)*torch.compile"):
        remat.optimize(_Runs(what), (torch.randn(8, 8),), budget=None)


@pytest.mark.parametrize(
    ("what", "said"),
    [(lambda _, x: _Box(x), "no tensor is found in the _Box"), (lambda _, x: x.detach(), "nothing requires grad")],
)
def test_a_block_wise_step_without_a_backward(what: Any, said: str) -> None:
    with pytest.raises(remat.CaptureError, match=said):
        remat.enable(_Runs(what), None, whole_model=False)(torch.randn(8, 8))


def test_sparse_inputs_and_buffers() -> None:
    model, x = _Runs(lambda self, x: torch.sparse.mm(self.matrix, x)), torch.eye(8).to_sparse()
    with pytest.raises(remat.CaptureError, match=r"an input is a tensor of layout"):
        remat.optimize(nn.Sequential(nn.Linear(8, 8)), (x,), budget=None)
    model.register_buffer("matrix", x)
    for make in (remat.optimize, remat.optimize_blocks):
        with pytest.raises(remat.CaptureError, match=r"matrix is a .* of layout"):
            make(model, (torch.randn(8, 8),), budget=None)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), torch.ones(8, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


@pytest.mark.filterwarnings("ignore:A model attribute")  # export says so too, and goes on
def test_a_tensor_that_trains_and_is_no_parameter() -> None:
    with pytest.raises(remat.CaptureError, match=r"0.scale requires grad; make it an nn.Parameter"):
        remat.optimize(nn.Sequential(_Scaled()), (torch.randn(4, 8),), budget=None)


def test_what_is_no_model_or_is_rewritten_already() -> None:
    model, x = mlp()
    enabled = remat.enable(mlp()[0], None)
    cases: list[tuple[Any, Any, str]] = [
        (lambda x: x, (x,), "is no nn.Module"),
        (remat.optimize(model, (x,), budget=None), (x,), "optimize the original"),
        (enabled, (x,), r"remat.disable"),
        (nn.Sequential(enabled), (x,), r"remat.disable"),
        (nn.Sequential(remat.optimize(model, (x,), budget=None)), (x,), "0 comes from remat.optimize"),
        (model, x, r"args=\(x,\)"),
    ]
    for given, args, said in cases:
        with pytest.raises(remat.RematError, match=said):
            remat.optimize(given, args, budget=None)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (remat.optimize, {"pin": {5: "SAVE"}}),
        (remat.fit, {"multiple_of": 3.5}),
        (remat.frontier, {"points": 1.5}),
        (remat.plan, {"optimizer": torch.optim.Adam}),
        (remat.plan, {"trainable_only": "no"}),
    ],
)
def test_arguments_of_another_type(call: Callable[..., Any], wrong: dict[str, Any]) -> None:
    model, x = mlp()
    (name,) = wrong
    with pytest.raises(remat.RematError, match=rf"{name}=.* (no string|whole number|no optimizer|neither True nor False)"):
        call(model, (x,), budget="1GiB", **wrong)


_GENERATOR = torch.Generator().manual_seed(1)


def test_a_generator_of_the_models_own() -> None:
    model = _Runs(lambda self, x: x * torch.bernoulli(torch.full_like(x, 0.5), generator=_GENERATOR))
    with pytest.raises(remat.CaptureError, match=r"draws from a generator of its own"):
        remat.optimize(model, (torch.randn(8, 8, requires_grad=True),), budget=None)


class _Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return (self.linear(x) + y).sum()


def test_an_input_that_is_written_to_and_shares_memory_with_another() -> None:
    model, x = _Writes(), torch.randn(8, 8)
    module = remat.optimize(model, (x.clone(), x.clone()), budget=None)
    with pytest.raises(remat.CaptureError, match=r"writes to one of its inputs, which shares memory with another"):
        module(x, x.view(8, 8))


class _Clipping(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, clip: float) -> None:
        super().__init__(params, lr)
        self.clip = clip


def test_optimizers_whose_state_cannot_be_predicted() -> None:
    model, x = mlp()
    for optimizer in (torch.optim.LBFGS(model.parameters()), _Clipping(model.parameters(), 0.1, 1.0)):
        with pytest.raises(remat.RematError, match=r"cannot be predicted .*take its first step before"):
            remat.plan(model, (x,), budget=None, optimizer=optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.ASGD, torch.optim.AdamW])
def test_optimizers_with_groups(kind: Any) -> None:
    model, x = mlp()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    optimizer = kind(groups)
    predicted = remat.plan(model, (x,), budget=None, optimizer=optimizer).resident_bytes
    model(x).backward()
    optimizer.step()
    model.zero_grad()
    assert remat.plan(model, (x,), budget=None, optimizer=optimizer).resident_bytes == predicted


@torch.library.custom_op("tests::over", mutates_args=())
def over(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    if not (by > 0).all():
        raise ValueError("by is not above zero")
    return x / by


over.register_fake(lambda x, by: torch.empty_like(x))
over.register_autograd(
    lambda ctx, gradient: (gradient / ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@pytest.mark.parametrize("costs", ["analytic", "measured"])
def test_ops_that_do_not_run_on_what_they_are_measured_with(costs: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, x = _Runs(lambda self, x: over(x, torch.ones_like(x))), torch.randn(8, 8, requires_grad=True)
    module = remat.optimize(model, (x,), budget=None, costs=costs)
    assert torch.equal(module(x), model(x))


def test_what_is_no_model_and_no_inputs() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match=r"a type is no nn\.Module"):
        remat.enable(Mlp, budget=None)
    with pytest.raises(remat.RematError, match=r"args is a Tensor; give a tuple"):
        remat.optimize(model, x, budget=None)
    calls: list[Callable[..., Any]] = [remat.optimize, remat.plan, remat.fit, remat.explain, remat.optimize_blocks]
    for call in calls:
        for wrong, said in (((x,), r"args is a Tensor; give a tuple"), (((), [x]), "kwargs is a list; give a dictionary")):
            with pytest.raises(remat.RematError, match=said):
                call(model, *wrong, budget="1GiB")
    with pytest.raises(remat.RematError, match=r"args is a Tensor; give a tuple"):
        remat.verify(model, None, x)  # type: ignore[arg-type]
    remat.enable(model, None)  # nothing of these calls is left


def test_a_model_that_has_a_plan_is_explained_by_it() -> None:
    model, x = mlp()
    module = remat.optimize(model, (x,), budget=None)
    with pytest.raises(remat.RematError, match="has a plan already, which is explained without a budget"):
        remat.explain(module, budget="1KiB")
    with pytest.raises(remat.RematError, match=r"of other models remat\.plan_of tells"):
        remat.plans(module)
    with pytest.raises(remat.RematError, match=r"of one that was compiled remat\.plans has the plans"):
        remat.plan_of(model)


def test_what_is_refused_anywhere_names_no_other_way() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    for call in (remat.optimize, remat.optimize_blocks):
        with pytest.raises(remat.CaptureError, match=r"an input is a .* torch\.sparse_coo, [^;]*; [^;]* handles this$"):
            call(model, (torch.randn(4, 8).to_sparse(),), budget=None)


class _Averaging(nn.Module):
    """Batch norm over all batches, beside its blocks."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.BatchNorm1d(8, momentum=None)
        self.uses = uses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return (self.norm(x) if self.uses else x).square().mean()


def test_batch_norm_over_all_batches_is_refused_where_it_is_captured() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(
        remat.CaptureError, match=r"averages batch norm over all batches .* give it a momentum; or block by block"
    ):
        remat.optimize(_Averaging(True), (x,), budget=None)
    with pytest.raises(remat.CaptureError, match=r"^block 1: .* give it a momentum$"):
        remat.optimize_blocks(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)), (x,), budget=None)
    remat.optimize(_Averaging(False), (x,), budget=None)(x).backward()
    model, plain = _Averaging(True), _Averaging(True)
    plain.load_state_dict(model.state_dict())
    remat.optimize_blocks(model, (x,), budget=None)
    for step in range(3):
        for trained in (plain, model):
            trained(x + step).backward()
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
