"""The rewritten module behaves as the one it came from."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat import state
from remat.program import KINDS
from tests.models import build, llama, mlp, smallest_budget
from tests.steps import assert_close_gradients, assert_same_gradients, gradients_of


def smallest(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return remat.optimize(model, args, kwargs, budget=remat.frontier(model, args, kwargs, points=2)[-1].peak_bytes)


def small() -> tuple[nn.Module, torch.Tensor, Any]:
    model, x = mlp()
    return model, x, remat.optimize(model, (x,), budget=smallest_budget())


class Frozen(nn.Module):
    """Has a say in its modes, in what it saves and in which gradients go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.cleared = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x)).square().mean()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "note": torch.ones(1)}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k: v for k, v in state_dict.items() if k != "note"}, *args, **kwargs)

    def get_extra_state(self) -> int:
        return self.cleared

    def set_extra_state(self, state: int) -> None:
        self.cleared = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)


def test_what_the_model_does_otherwise_than_other_modules_it_does_still() -> None:
    model, x = Frozen().train(), torch.randn(16, 8)
    module = remat.optimize(model, (x,), budget=None)
    module.eval()
    assert module.train() is module
    assert (module.training, model.training, model.norm.training) == (True, True, False)
    before = model.norm.running_mean.clone()
    module(x).backward()
    assert torch.equal(model.norm.running_mean, before)
    module.zero_grad()
    assert (model.cleared, model.first.weight.grad) == (1, None)
    called: list[str] = []
    model.register_state_dict_pre_hook(lambda *_: called.append("to be saved"))
    model.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    saved: dict[str, Any] = {name: torch.as_tensor(value).clone() for name, value in module.state_dict().items()}
    assert set(saved) == set(model.state_dict())
    assert "note" in saved
    saved["_extra_state"] = 5
    saved["first.bias"] += 1
    module.load_state_dict(saved)
    assert called == ["to be saved", "to be saved", "loaded"]
    assert model.cleared == 5
    assert torch.equal(model.first.bias, saved["first.bias"])
    outer = nn.Sequential(module)
    saved["first.bias"] += 1
    outer.load_state_dict({f"0.{name}": value for name, value in saved.items() if name != "note"})
    assert torch.equal(model.first.bias, saved["first.bias"])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_model_itself(register: str, before: bool) -> None:
    """No graph keeps them; on the module that optimize returns they run."""
    model, x = mlp()
    x.requires_grad_()
    module = remat.optimize(model, (x,), budget=None)
    calls: list[int] = []
    getattr(module, register)(lambda *_: calls.append(1))
    module(x).sum().backward()
    assert calls == [1]
    if before:
        module = remat.optimize(model, budget=None)
    getattr(model, register)(lambda *_: None)
    with pytest.raises(remat.CaptureError, match="the model has a backward hook, which no graph keeps; put it on what"):
        module(x)


@pytest.mark.parametrize("pin", [{"mul": "OFFLOAD"}, {"mul": "RECOMPUTE"}])
def test_a_tensor_changed_before_backward_is_an_error_whoever_saved_it(pin: dict[str, str]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))

        def forward(self, x: torch.Tensor) -> Any:
            y = x * self.weight
            return y.sin().sum(), (y + self.shift).sum()

    model, x = Scaled(), torch.randn(256, 64, requires_grad=True)
    module = remat.optimize(model, (x,), budget=None, pin=pin, host_budget="1GiB")
    for i in (0, 1):
        out = module(x)
        with torch.no_grad():
            model.weight += 1
        with pytest.raises(remat.RewriteError, match="modified in place"):
            out[i].backward()


def test_it_is_a_graph_module_with_the_original_parameters() -> None:
    model, _, module = small()
    assert isinstance(module, torch.fx.GraphModule)
    assert list(module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True))
    assert module.layers is model.layers
    assert remat.plan_of(module) is module.plan


def test_buffers_are_shared_and_updated_once_per_step() -> None:
    model, kwargs = build("resnet")
    twin = copy.deepcopy(model)
    module = smallest(model, **kwargs)
    assert [n for n, _ in module.named_buffers()] == [n for n, _ in model.named_buffers()]
    for _ in range(2):
        gradients_of(module, **kwargs)
        gradients_of(twin, **kwargs)
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), name


def test_state_dict_loads_both_ways() -> None:
    model, x, module = small()
    other = copy.deepcopy(model)
    nn.init.ones_(other.layers[0][1].weight)
    module.load_state_dict(other.state_dict())
    assert torch.equal(model.layers[0][1].weight, other.layers[0][1].weight)
    assert_close_gradients(gradients_of(module, x), gradients_of(other, x), 1e-6)
    other.load_state_dict(module.state_dict())


def test_optimizer_steps_train_the_original() -> None:
    model, x, module = small()
    twin = copy.deepcopy(model)
    for m in (module, twin):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        torch.manual_seed(3)
        for _ in range(3):
            m(x).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_eval_and_no_grad_run_the_original() -> None:
    model, x, module = small()
    assert module.training
    assert module.eval() is module
    assert not model.training
    assert not model.layers[0].training
    assert torch.equal(module(x), model(x))
    assert module.train().training
    assert model.training
    torch.manual_seed(5)
    with torch.no_grad():
        found = module(x)
    torch.manual_seed(5)
    assert torch.equal(found, model(x))
    assert not found.requires_grad


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_in_eval_mode_are_outside_of_the_budget_and_that_is_said_once(
    in_place: bool, caplog: pytest.LogCaptureFixture
) -> None:
    state._say_unplanned.cache_clear()
    model, x, module = small()
    if in_place:
        module = remat.enable(model, 0.9)
    module.eval()
    with caplog.at_level(logging.WARNING, logger="remat"):
        with torch.no_grad():
            module(x)
        assert not [r for r in caplog.records if r.name == "remat"]
        module(x)
        module(x)
    (said,) = [r for r in caplog.records if r.name == "remat"]
    assert "no_grad" in said.getMessage()


def test_switching_the_mode_of_a_part_is_seen() -> None:
    model, x, module = small()
    module.dropout.eval()
    assert_close_gradients(gradients_of(module, x), gradients_of(model, x), 1e-6)
    module.dropout.train()
    assert_close_gradients(gradients_of(module, x), gradients_of(model, x), 1e-6)


def test_freezing_a_parameter_is_seen() -> None:
    model, x, module = small()
    model.layers[0].requires_grad_(False)
    found = gradients_of(module, x)
    assert "layers.0.1.weight" not in found
    assert_close_gradients(found, gradients_of(model, x), 1e-6)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return found


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_around_a_call_that_is_captured(whole: bool) -> None:
    inner, x = mlp(dropout=0.0)
    expected = gradients_of(Checkpointed(inner), x)
    remat.enable(inner, None, whole_model=whole)
    assert_same_gradients(gradients_of(Checkpointed(inner), x), expected)


@pytest.mark.slow
def test_autocast_is_kept_in_the_recomputed_ops() -> None:
    model, kwargs = build("gpt2")
    module = remat.optimize(model, budget=0.75)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(**kwargs)
        found = gradients_of(module, **kwargs)
        unconstrained = remat.optimize(model, (), kwargs, budget=None)
        assert_same_gradients(found, gradients_of(unconstrained, **kwargs))
        assert_close_gradients(found, gradients_of(model, **kwargs), 1e-2)  # bfloat16 has three digits
        measured = remat.measure(lambda: module(**kwargs).loss.backward()).peak_bytes
        assert 0.97 * module.plan.peak_bytes < measured <= module.plan.peak_bytes
    assert any("bfloat16" in a.dtype for block in module.plan.blocks for a in block.activations)
    assert remat.Decision.RECOMPUTE in module.plan.decisions.values()
    module(**kwargs)
    assert_close_gradients(gradients_of(module, **kwargs), gradients_of(model, **kwargs), 1e-5)


def test_backward_outside_of_autocast() -> None:
    model, x = mlp()
    module = remat.optimize(model, budget=0.75)

    def gradients(m: nn.Module) -> dict[str, torch.Tensor]:
        m.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = m(x)
        loss.backward()
        return {n: p.grad for n, p in m.named_parameters()}

    unconstrained = remat.optimize(model, budget=None)
    gradients(module), gradients(unconstrained)
    assert_same_gradients(gradients(module), gradients(unconstrained))
    assert_close_gradients(gradients(module), gradients(model), 1e-2)


@pytest.mark.parametrize("forward_too", [True, False])
def test_backward_within_autocast(forward_too: bool) -> None:
    """What is recomputed there is computed as it was in forward."""
    model, x = mlp()

    def gradients(m: nn.Module) -> dict[str, torch.Tensor]:
        m.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_too):
            loss = m(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        return {n: p.grad for n, p in m.named_parameters()}

    module, unconstrained = (remat.optimize(model, budget=None, policy=policy) for policy in ("blocks", "auto"))
    assert_same_gradients(gradients(module), gradients(unconstrained))
    assert remat.Decision.RECOMPUTE in module.plan.decisions.values()


def test_deepcopy_is_independent() -> None:
    model, x, module = small()
    expected = gradients_of(module, x)
    twin = copy.deepcopy(module)
    assert type(twin).__name__ == type(module).__name__
    assert twin.plan == module.plan
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_gradients(gradients_of(twin, x), expected)


def _before(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


def _doubled(module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _halved(module: nn.Module, grads: Any, outputs: Any) -> Any:
    return None


def _noted(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    state["noted"] = torch.ones(1)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "copy", "pickle"]
)
def test_copies_keep_hooks(way: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x = mlp(dropout=0.0)
    module = remat.optimize(model, (x,), budget=None, dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    module.register_forward_pre_hook(_before)
    module.register_forward_hook(_doubled, with_kwargs=True)
    module.register_full_backward_hook(_halved)
    module.register_state_dict_post_hook(_noted)
    twin = way(module)
    assert torch.equal(twin(x), module(x))
    assert torch.equal(twin(x), 2 * model(x + 1))
    assert list(twin._backward_hooks.values()) == [_halved]
    assert "noted" in twin.state_dict()
    with caplog.at_level(logging.INFO, logger="remat"):
        twin(x[:8])
    assert not [r for r in caplog.records if "plans again" in r.getMessage()]


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_round_trip(how: str) -> None:
    _, x, module = small()
    expected = gradients_of(module, x)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin.plan == module.plan
    twin(x)
    assert_same_gradients(gradients_of(twin, x), expected)
    assert twin.plan.peak_bytes <= module.plan.budget_bytes


def test_pickles_say_that_they_leave_out_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    model, x = mlp()
    module = remat.optimize(model, (x,), budget=None, loss=lambda output: 2 * output)
    pickle.dumps(module)
    assert "what is pickled leaves out loss=" in caplog.text


def test_signature_and_attributes_are_the_original() -> None:
    model, kwargs = llama(layers=1)
    module = remat.optimize(model.train(), (), kwargs, budget=None)
    assert inspect.signature(module.forward) == inspect.signature(model.forward)
    assert module.config is model.config
    assert module.model is model.model
    assert module.get_input_embeddings() is model.get_input_embeddings()
    assert module.device == model.device
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = module.no_such_thing


class Options(nn.Module):
    """Keyword-only and non-tensor inputs, a dictionary in, a tuple out with a constant in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(
        self, batch: dict[str, torch.Tensor], /, scale: float = 1.0, *, mode: str, extra: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        hidden = self.second(torch.tanh(self.first(batch["x"])) * scale)
        if mode == "shift":
            hidden = hidden + (extra if extra is not None else 1.0)
        return hidden.square().mean(), {"mode": mode, "hidden": hidden.detach(), "nothing": None}


def test_keyword_only_and_non_tensor_inputs() -> None:
    model = Options().train()
    batch = {"x": torch.randn(32, 16)}
    module = remat.optimize(model, (batch,), {"mode": "plain"}, budget=None)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((batch,), {"mode": "plain"}),
        ((batch, 2.0), {"mode": "plain"}),
        ((batch,), {"mode": "shift", "scale": 2.0}),
        ((batch,), {"mode": "shift", "extra": torch.ones(16)}),
    ]
    for args, kwargs in calls:
        loss, rest = module(*args, **kwargs)
        expected, expected_rest = model(*args, **kwargs)
        assert torch.equal(loss, expected)
        assert rest["mode"] == kwargs["mode"]
        assert rest["nothing"] is None
        assert torch.equal(rest["hidden"], expected_rest["hidden"])
        assert not rest["hidden"].requires_grad
        found = torch.autograd.grad(loss, list(module.parameters()))
        for a, b in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(TypeError, match="mode"):
        module(batch)


def test_kwargs_in_another_order_are_the_same_call() -> None:
    model = Options().train()
    batch = {"x": torch.randn(32, 16)}
    module = remat.optimize(model, (batch,), {"mode": "shift", "extra": torch.ones(16)}, budget=None)
    captured = module.plan
    assert torch.equal(
        module(batch, extra=torch.ones(16), mode="shift")[0], model(batch, mode="shift", extra=torch.ones(16))[0]
    )
    assert module.plan is captured


def test_captured_at_the_first_call() -> None:
    model, x = mlp()
    module = remat.optimize(model, budget=0.75)
    assert module.plan is None
    module(x).backward()
    assert module.plan is not None
    assert module.plan.peak_bytes <= module.plan.budget_bytes
    module.zero_grad()
    torch.manual_seed(1)
    expected = gradients_of(model, x)
    assert_close_gradients(gradients_of(module, x), expected, 1e-6)


def test_capturing_draws_no_random_numbers() -> None:
    model, x = mlp(width=40)  # a shape that no other test uses: kernels are measured once per shape
    before = torch.get_rng_state()
    module = remat.optimize(model, (x,), budget=None)
    assert torch.equal(torch.get_rng_state(), before)
    module(x[:17])
    torch.set_rng_state(before)
    model(x[:17])
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    remat.optimize(model, budget=None)(x[:17])
    assert torch.equal(torch.get_rng_state(), expected)


def test_other_shapes_are_captured_and_planned_again(caplog: pytest.LogCaptureFixture) -> None:
    model, x, module = small()
    first = module.plan
    with caplog.at_level(logging.INFO, logger="remat"):
        for rows in (16, 24, 16):
            module(x[:rows])
            assert_close_gradients(gradients_of(module, x[:rows]), gradients_of(model, x[:rows]), 1e-6)
    assert module.plan != first
    assert len([r for r in caplog.records if "plans again" in r.getMessage()]) == 1
    assert_close_gradients(gradients_of(module, x), gradients_of(model, x), 1e-6)


def test_other_shapes_meet_the_budget_or_say_so() -> None:
    _, x, module = small()
    with pytest.raises(remat.BudgetError, match="no plan fits"):
        module(torch.cat([x] * 8))


def test_dynamic_shapes_are_captured_without_notice(caplog: pytest.LogCaptureFixture) -> None:
    model, x = mlp()
    module = remat.optimize(model, (x,), budget=None, dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    with caplog.at_level(logging.INFO, logger="remat"):
        module(x[:24])
    assert not [r for r in caplog.records if "plans again" in r.getMessage()]


def test_gradients_of_inputs() -> None:
    model, x = mlp(dropout=0.0)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    module = smallest(model, a)
    module(a).backward()
    model(b).backward()
    assert torch.equal(a.grad, b.grad)


def test_gradients_accumulate() -> None:
    model, x = mlp(rows=512)
    module = remat.optimize(model, (x,), budget=0.5)

    def accumulated(m: nn.Module) -> dict[str, torch.Tensor]:
        m.zero_grad()
        torch.manual_seed(1)
        for _ in range(3):
            m(x).backward()
        return {n: p.grad.clone() for n, p in m.named_parameters()}

    assert_close_gradients(accumulated(module), accumulated(model), 1e-6)


def test_a_step_that_adds_to_gradients_stays_within_the_budget() -> None:
    model, x = mlp(dropout=0.0, rows=64)
    adding = sum(p.nbytes for p in model.parameters())
    budget = remat.frontier(model, (x,), points=2)[-1].peak_bytes + adding
    module = remat.optimize(model, (x,), budget=budget)
    first = module.plan
    module(x).backward()
    assert remat.measure(lambda: module(x).backward()).peak_bytes <= budget
    assert module.plan.peak_bytes <= budget
    assert dict(zip(KINDS, module.plan.timeline[0].by_kind, strict=True))["gradients"] == adding
    model.zero_grad()
    module(x).backward()
    assert len(module._variants) == 2
    assert first.peak_bytes <= budget


def test_a_budget_too_small_to_add_to_gradients_is_an_error() -> None:
    _, x, module = small()
    module(x).backward()
    with pytest.raises(remat.BudgetError, match="Gradients are there already"):
        module(x)


def test_hooks_of_the_module_run() -> None:
    _, x, module = small()
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    handle = module.layers[0][1].weight.register_hook(lambda grad: seen.append("gradient"))
    module(x).backward()
    handle.remove()
    assert seen == ["before", "after", "gradient"]


def test_tied_parameters_stay_tied() -> None:
    model, kwargs = build("gpt2")
    module = smallest(model, **kwargs)
    assert module.lm_head.weight is module.transformer.wte.weight
    assert list(module.state_dict()) == list(model.state_dict())


def test_print_readable_shows_regions_and_decisions(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, module = small()
    text = module.print_readable(print_output=False)
    assert "region_0" in text
    assert "recompute" in text.lower()
    module.print_readable()
    assert "region_0" in capsys.readouterr().out
    module.graph.lint()


def test_regions_carry_their_decisions() -> None:
    _, _, module = small()
    decided = {
        node.name: node.meta["recompute"].name
        for name, region in module.named_children()
        if name.startswith("region_")
        for node in region.graph.nodes
        if "recompute" in node.meta
    }
    for name in module.plan.dropped:
        assert decided[name] == "MUST_RECOMPUTE"
    assert "MUST_SAVE" in decided.values()


def test_a_plan_can_be_used_again() -> None:
    model, x, module = small()
    again = remat.Plan.from_json(module.plan.to_json())
    twin = remat.optimize(model, (x,), budget=None, plan=again)
    unbound = dataclasses.replace(module.plan, budget_bytes=None)
    assert twin.plan == unbound
    assert_same_gradients(gradients_of(twin, x), gradients_of(module, x))
    assert remat.plan(model, (x,), budget=None, plan=again) == unbound


def test_a_plan_for_another_graph_is_refused() -> None:
    model, x, module = small()
    with pytest.raises(remat.RematError, match=r"other sizes: an input: .*; plan again, or for a range of them"):
        remat.optimize(model, (x[:8],), budget=None, plan=module.plan)
    other, y = mlp(layers=3)
    with pytest.raises(remat.RematError, match="another graph"):
        remat.optimize(other, (y,), budget=None, plan=module.plan)


def test_the_optimizer_state_is_resident() -> None:
    model, x = mlp()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    without = remat.plan(model, (x,), budget=None)
    optimizer = torch.optim.AdamW(model.parameters())
    predicted = remat.plan(model, (x,), budget=None, optimizer=optimizer)
    assert predicted.resident_bytes - without.resident_bytes >= 2 * weights
    assert predicted.resident_bytes - without.resident_bytes <= 2 * weights + 1024
    assert not optimizer.state
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = remat.plan(model, (x,), budget=None, optimizer=optimizer)
    assert abs(found.resident_bytes - predicted.resident_bytes) <= 64 * len(optimizer.state)
    assert predicted.peak_bytes - predicted.resident_bytes == without.peak_bytes - without.resident_bytes


def test_gradients_that_are_there_are_resident() -> None:
    model, x = mlp()
    without = remat.plan(model, (x,), budget=None)
    model(x).backward()
    with_gradients = remat.plan(model, (x,), budget=None)
    assert with_gradients.resident_bytes - without.resident_bytes == sum(p.grad.nbytes for p in model.parameters())


def test_ddp_with_one_process(tmp_path: Any) -> None:
    model, x, module = small()
    expected = gradients_of(model, x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        found = gradients_of(wrapped, x)
        del wrapped  # before its group: as the last to hold that, it would wait for a thread of gloo's that waits for Python
    finally:
        torch.distributed.destroy_process_group()
    assert_close_gradients({n.removeprefix("module."): g for n, g in found.items()}, expected, 1e-6)


def test_two_modules_from_one_model_share_its_weights() -> None:
    model, x, module = small()
    other = remat.optimize(model, (x,), budget=None)
    assert_same_gradients(gradients_of(module, x), gradients_of(other, x))


def test_a_generation_cache_is_left_out_of_training() -> None:
    model, kwargs = build("llama")
    model.config.use_cache = True
    module = remat.optimize(model, (), kwargs, budget=None)
    assert module(**kwargs).past_key_values is None
    assert model.config.use_cache


@pytest.mark.parametrize("whole", [True, False])
def test_that_the_cache_is_left_out_is_said_once(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, kwargs = llama(layers=1)
    model.train().config.use_cache = True
    remat.enable(model, None, whole_model=whole, policy="none")
    with caplog.at_level(logging.INFO, logger="remat"):
        for _ in range(3):
            gradients_of(model, **kwargs)
    assert len([r for r in caplog.records if "cache is left out" in r.getMessage()]) == 1


def test_names_that_models_use_are_theirs() -> None:
    """The private ones are the module's own; `gate` and `rewrite` are not among them."""
    model = nn.Module()
    model.gate, model.rewrite, model.forward = nn.Linear(4, 4), nn.Linear(4, 4), lambda x: model.rewrite(model.gate(x))  # type: ignore[assignment]
    optimized = remat.optimize(model, budget=None)
    assert optimized.gate is model.gate
    assert optimized.rewrite is model.rewrite
