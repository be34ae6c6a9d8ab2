"""Threads: what remat does to torch while it captures a model is not for those that train another."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat.gate import Gate
from tests.models import mlp


def _optimize(model: nn.Module, x: torch.Tensor) -> Any:
    return remat.optimize(model, (x,), budget=0.8)(x)


def _enable(model: nn.Module, x: torch.Tensor) -> Any:
    return remat.enable(model, 0.8)(x)


def _by_block(model: nn.Module, x: torch.Tensor) -> Any:
    return remat.enable(model, 0.9, whole_model=False)(x)


def _errors(*works: Callable[[], Any]) -> list[Exception]:
    """What is raised where all of these run at once."""
    found: list[Exception] = []
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> None:
        ready.wait()
        try:
            work()
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("rewrite", [_optimize, _enable, _by_block])
def test_two_models_are_captured_at_once(rewrite: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    def work() -> None:
        model, x = mlp()
        rewrite(model, x).backward()
        assert all(p.grad is not None for p in model.parameters())

    assert not _errors(work, work)


@pytest.mark.parametrize("enable", [_enable, _by_block])
def test_an_enabled_model_trains_while_another_is_exported(
    monkeypatch: pytest.MonkeyPatch, enable: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> None:
    model, x = mlp()
    enable(model, x)
    plan = remat.plan_of(model)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # torch has one flag for all threads
    model(x).backward()
    assert remat.plan_of(model) is plan
    assert all(p.grad is not None for p in model.parameters())


def test_offload_works_while_another_model_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp()
    offloading = remat.optimize(model, (x,), budget=0.6, host_budget="1GiB", policy="offload")
    assert offloading.plan.transfers
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    offloading(x).backward()
    assert all(p.grad is not None for p in model.parameters())


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_another_model_trains_while_one_is_captured() -> None:
    """It does all that makes a model one that cannot be captured."""
    body, x = mlp()
    other, ids = mlp()[0], torch.randn(64, 32)
    done = threading.Event()
    steps = 0

    def train() -> None:
        nonlocal steps
        while not done.is_set():
            loss = checkpoint(other, Squared.apply(ids.clone().requires_grad_()), use_reentrant=False)
            loss.register_hook(lambda gradient: gradient)
            other.loss = loss
            (gradient,) = torch.autograd.grad(loss, [other.layers[0][1].weight])
            assert gradient.shape == (128, 32)
            steps += 1

    def capture() -> None:
        try:
            remat.optimize(body, (x,), budget=0.8)
        finally:
            done.set()

    assert not _errors(train, capture)
    assert steps


def test_models_with_packed_rows_beside_others() -> None:
    """Captures look how transformers looks at positions, of their own model alone."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model, other = (transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False)) for _ in range(2))
    ids = torch.randint(0, 64, (1, 16))
    packed = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.cat([torch.arange(8), torch.arange(8)])[None]}
    stop, runs = threading.Event(), threading.Event()

    def train() -> None:
        while not stop.is_set():
            other(input_ids=ids, position_ids=torch.arange(16)[None])
            runs.set()

    thread = threading.Thread(target=train)
    thread.start()
    runs.wait()
    try:
        module = remat.optimize(model, (), packed, budget=None)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(module(**packed).loss, model(**packed).loss)


def test_evaluations_that_overlap_leave_the_budget_on() -> None:
    model, x = (
        nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))),
        torch.randn(4, 8),
    )
    remat.enable(model, None, whole_model=False)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def meet(*_: Any) -> None:
        (first_in if threading.current_thread().name == "first" else second_in).set()
        assert (second_in if threading.current_thread().name == "first" else first_out).wait(10)

    def evaluate() -> None:
        with torch.no_grad():
            model(x)
        if threading.current_thread().name == "first":
            first_out.set()

    hook = model[0].register_forward_pre_hook(meet)
    first, second = (threading.Thread(target=evaluate, name=name) for name in ("first", "second"))
    first.start()
    assert first_in.wait(10)
    second.start()
    for thread in (first, second):
        thread.join()
    hook.remove()
    model(x).sum().backward()
    assert remat.plan_of(model) is not None


@pytest.mark.parametrize("rewrite", [remat.optimize, remat.enable])
def test_one_model_in_two_threads(rewrite: Callable[..., nn.Module]) -> None:
    """One meets new sizes, which are captured; the other learns and evaluates meanwhile. torch.export turns mkldnn off for the
    process while it traces, so that last bits may differ."""
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)))
    inputs = torch.randn(16, 32, requires_grad=True)
    output = model(inputs)
    (expected,) = torch.autograd.grad(output.sum(), inputs)
    rewritten = rewrite(model, budget=None)
    torch.autograd.grad(rewritten(inputs).sum(), inputs)
    met = threading.Event()

    def meet() -> None:
        try:
            for rows in range(1, 5):
                torch.autograd.grad(rewritten(torch.randn(rows, 32, requires_grad=True)).sum(), list(model.parameters()))
        finally:
            met.set()

    def learn() -> None:
        while not met.is_set():
            (found,) = torch.autograd.grad(rewritten(inputs).sum(), inputs)
            torch.testing.assert_close(found, expected)
            with torch.no_grad():
                torch.testing.assert_close(rewritten(inputs), output)

    assert _errors(meet, learn) == []


class _Adapts(nn.Module):
    """Trains itself within an evaluation, on fewer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, adapt: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        if adapt is not None:
            with torch.enable_grad():
                adapt(x[:4]).backward()
        return self.head(self.layer(x).relu()).mean()


@pytest.mark.parametrize("rewrite", [remat.optimize, remat.enable])
def test_a_call_within_another_one_of_the_same_thread_waits_for_nobody(rewrite: Callable[..., nn.Module]) -> None:
    model, x = _Adapts(), torch.randn(16, 8)
    rewritten = rewrite(model, budget="1MiB")
    rewritten(x).backward()
    with torch.no_grad():
        rewritten(x, adapt=rewritten)

    def loss(output: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = consistent(x)
        return (output - target).square().mean()

    consistent = rewrite(copy.deepcopy(_Adapts()), budget="1MiB", loss=loss)
    loss(consistent(x)).backward()
    assert remat.plan_of(consistent) is not None


def test_threads_share_a_model_block_by_block() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model, ids = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).train(), torch.randint(0, 64, (2, 16))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    remat.enable(model, None, whole_model=False)

    def work() -> None:
        for _ in range(10):
            model(input_ids=ids, labels=ids).loss.backward()

    assert not _errors(work, work, work)
    assert model.config.use_cache


def test_captures_beside_each_other_leave_torch_as_it_was() -> None:
    before = vars(torch.jit.ScriptFunction)["__call__"]

    def work() -> None:
        remat.plan(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), (torch.randn(2, 8),), budget=None)

    assert not _errors(work, work, work)
    assert vars(torch.jit.ScriptFunction)["__call__"] is before


def test_numbers_that_another_thread_draws_are_none_of_the_models() -> None:
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            random.random()

    def work() -> None:
        try:
            remat.plan(nn.Linear(8, 8), (torch.randn(2, 8),), budget=None)
        finally:
            done.set()

    assert not _errors(draw, work)


def test_a_call_that_waits_for_another_threads_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remat.gate._PATIENCE_S", 0.05)
    gate, inside, done = Gate(), threading.Event(), threading.Event()

    def capture() -> None:
        with gate.capture():
            inside.set()
            done.wait(10)

    def call() -> None:
        inside.wait(10)
        try:
            with gate.call():
                pass
        finally:
            done.set()

    (error,) = _errors(capture, call)
    assert isinstance(error, remat.RewriteError)
    assert "has not ended in" in str(error)
