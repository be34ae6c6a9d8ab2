"""Storages on their way to the host and back, and what stays behind when something goes wrong."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import remat
from remat import transfer
from remat.transfer import HostBuffer, HostPool, HostTier, Moved, host_tier
from tests.lanes import slow_copies
from tests.models import build, mlp
from tests.steps import loss_of


@pytest.fixture
def tier() -> HostTier:
    tier = host_tier(torch.device("cpu"))
    gc.collect()
    assert tier.pool.in_use_bytes == 0
    tier.pool.clear()
    return tier


def test_the_bytes_survive(tier: HostTier) -> None:
    source = torch.randn(10, 7)
    moved = Moved(source.untyped_storage())
    moved.release()
    bits = source.view(torch.uint8).flatten().clone()
    assert torch.equal(moved.tensor(), bits)


def test_device_memory_is_gone_after_release_and_back_after_reload(tier: HostTier) -> None:
    storage = torch.randn(1 << 16).untyped_storage()
    gone = weakref.ref(storage)
    moved = Moved(storage)
    del storage
    assert gone() is not None
    moved.release()
    assert gone() is None

    def there_and_back() -> None:
        moved.reload()
        moved.tensor()

    assert remat.measure(there_and_back).peak_bytes >= 1 << 18


def test_host_memory_is_not_the_devices(tier: HostTier) -> None:
    tensor = torch.randn(1 << 16)
    kept: list[Moved] = []
    above = remat.measure(lambda: kept.append(Moved(tensor.untyped_storage())))
    assert above.peak_bytes - above.resident_bytes < 1 << 12


def test_buffers_have_the_exact_size_and_are_used_again() -> None:
    pool = HostPool(torch.device("cpu"))
    first = pool.take(1000)
    assert (first.bytes.nbytes, pool.bytes, pool.in_use_bytes) == (1000, 1000, 1000)
    pool.give(first)
    assert pool.take(1000) is first
    assert pool.take(1000) is not first
    assert pool.made == 2


def test_buffers_of_ever_other_sizes_do_not_add_up() -> None:
    pool = HostPool(torch.device("cpu"))
    for length in (*range(700, 1001, 3), *range(1000, 0, -1)):
        lent = [pool.take(length), pool.take(2 * length)]
        assert all(buffer.bytes.nbytes >= size for buffer, size in zip(lent, (length, 2 * length), strict=True))
        assert pool.bytes <= 1.25 * 3 * 1000
        for buffer in lent:
            pool.give(buffer)
    made = pool.made
    for length in (900, 1000) * 10:  # of two sizes not far from each other the larger one's serve both
        lent = [pool.take(length), pool.take(2 * length)]
        for buffer in lent:
            pool.give(buffer)
    assert pool.made <= made + 4


def test_buffers_may_come_back_while_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A garbage collection runs when it likes, and what it finds gives its buffers back."""
    pool = HostPool(torch.device("cpu"))
    lent = pool.take(10)

    def collecting(size: int, device: torch.device) -> HostBuffer:
        pool.give(lent)
        return HostBuffer(size, device)

    monkeypatch.setattr(transfer, "HostBuffer", collecting)
    thread = threading.Thread(target=pool.take, args=(20,), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert pool.in_use_bytes == 20


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def cudaHostRegister(*_: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Full)
    pool = HostPool(torch.device("cuda"))
    with pytest.raises(remat.RematError, match=r"cannot pin 1000 B of host memory .* lower host_budget="):
        pool.take(1000)
    assert (pool.bytes, pool.in_use_bytes, pool.made) == (0, 0, 0)


def test_a_value_that_nobody_asks_for_gives_its_buffer_back(tier: HostTier) -> None:
    moved = Moved(torch.randn(100).untyped_storage())
    moved.reload()
    assert tier.pool.in_use_bytes == 400
    del moved
    assert tier.pool.in_use_bytes == 0


def test_a_buffer_is_not_written_while_it_is_read(tier: HostTier) -> None:
    made = tier.pool.made
    with slow_copies(torch.device("cpu"), 0.005):
        for k in range(30):
            moved = Moved(torch.full((1000,), float(k)).untyped_storage())
            moved.release()
            assert torch.equal(moved.tensor().view(torch.float32), torch.full((1000,), float(k)))
    assert tier.pool.made == made + 1


@pytest.mark.parametrize("policy", ["offload", "offload-all"])
def test_steps_leak_nothing_and_allocate_no_new_buffers(policy: str, tier: HostTier) -> None:
    model, kwargs = build("gpt2")
    module = remat.optimize(model, (), kwargs, budget=None, policy=policy)

    def step() -> None:
        module(**kwargs).loss.backward()
        module.zero_grad(set_to_none=True)

    step()
    made, held = tier.pool.made, tier.pool.bytes
    assert module.plan is not None
    assert held == module.plan.host_bytes
    peaks = {remat.measure(step).peak_bytes for _ in range(10)}
    assert len(peaks) == 1
    assert (tier.pool.made, tier.pool.bytes, tier.pool.in_use_bytes) == (made, held, 0)


@pytest.mark.slow
@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.usefixtures("_dynamo")
def test_hundreds_of_steps_leak_nothing(door: int, tier: HostTier) -> None:
    model, x = mlp(dropout=0.1)
    if door == 1:
        step_of = remat.optimize(model, (x,), budget=None, policy="offload-all")
    else:
        step_of = torch.compile(model, backend="remat", options={"compiler": "eager", "policy": "offload-all"})

    def step() -> None:
        step_of(x).backward()
        model.zero_grad(set_to_none=True)

    step()
    first = remat.measure(step).peak_bytes
    gc.collect()
    made, held, objects = tier.pool.made, tier.pool.bytes, len(gc.get_objects())
    assert made > 0
    for _ in range(300):
        step()
    gc.collect()
    assert (tier.pool.made, tier.pool.bytes, tier.pool.in_use_bytes) == (made, held, 0)
    assert len(gc.get_objects()) < objects + 300
    assert remat.measure(step).peak_bytes == first


class _FailsAt(TorchDispatchMode):
    """Runs out of memory at the k-th op."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("made up")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [10, 25, 40, 55])
def test_running_out_of_memory_frees_everything(k: int, tier: HostTier) -> None:
    """In forward or in backward; the next step is right."""
    model, x = mlp(dropout=0.0)
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")
    expected = torch.autograd.grad(module(x), list(model.parameters()))
    with pytest.raises(torch.OutOfMemoryError, match="made up"), _FailsAt(k):
        module(x).backward()
    gc.collect()
    assert tier.pool.in_use_bytes == 0
    found = torch.autograd.grad(module(x), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_exception_frees_everything(tier: HostTier) -> None:
    model, x = mlp(dropout=0.0)
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")

    def fail(_: torch.Tensor) -> None:
        raise ValueError("in backward")

    loss = loss_of(module(x), {})
    next(model.parameters()).register_hook(fail)
    assert tier.pool.in_use_bytes > 0
    with pytest.raises(ValueError, match="in backward"):
        loss.backward()
    del loss
    gc.collect()
    assert tier.pool.in_use_bytes == 0


def test_forward_without_backward_frees_everything(tier: HostTier) -> None:
    model, x = mlp(dropout=0.0)
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")
    for _ in range(3):
        module(x)
    gc.collect()
    assert tier.pool.in_use_bytes == 0


def test_a_retained_graph_runs_twice(tier: HostTier) -> None:
    model, x = mlp(dropout=0.2)
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")
    loss = module(x)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert all(torch.equal(p.grad, once[name]) for name, p in model.named_parameters())  # type: ignore[arg-type]


def test_two_steps_at_once_do_not_meet(tier: HostTier) -> None:
    """Forward, forward, backward, backward; and steps on two threads."""
    model, x = mlp(dropout=0.0)
    module = remat.optimize(model, (x,), budget=None, policy="offload-all")
    y = torch.randn_like(x)
    expected = [torch.autograd.grad(model(z), list(model.parameters())) for z in (x, y)]
    losses = [module(x), module(y)]
    found = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    threads = [threading.Thread(target=lambda z=z: module(z).backward()) for z in (x, y)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(g, h) for g, h in zip(a, b, strict=True))
    for p, g, h in zip(model.parameters(), *expected, strict=True):
        assert torch.allclose(p.grad, g + h)  # type: ignore[arg-type]
