"""Copies beside compute: nothing changes, memory is really gone meanwhile, and nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch

import remat
from benchmarks.stack import stack
from remat.transfer import Moved, host_tier
from tests.gpu.case import Case, plan_of, run_step, small
from tests.lanes import slow_copies


@contextlib.contextmanager
def busy_stream(device: torch.device) -> Iterator[None]:
    """A third stream that computes all the while."""
    stop, a = threading.Event(), torch.randn(1024, 1024, device=device)
    stream = torch.Stream(device)

    def work() -> None:
        with stream, torch.no_grad():
            while not stop.is_set():
                for _ in range(20):
                    a @ a
                stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Transfers(Case):
    def test_twenty_steps_with_three_streams_busy(self) -> None:
        for policy in ("offload", "offload-all"):
            with self.subTest(policy=policy):
                model, x = small()
                start = {name: value.clone() for name, value in model.state_dict().items()}
                expected = self._train(model, remat.optimize(model, (x,), budget=None), x)
                model.load_state_dict(start)
                module = remat.optimize(model, (x,), budget=None, policy=policy)
                slow = slow_copies(x.device, 0.002) if x.device.type == "cuda" else contextlib.nullcontext()
                with busy_stream(self.device), slow:
                    found = self._train(model, module, x)
                for a, b in zip(found, expected, strict=True):
                    self.assert_same(a, b)

    def _train(self, model: torch.nn.Module, module: torch.nn.Module, x: torch.Tensor) -> list[list[torch.Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        steps = []
        for seed in range(20):
            steps.append(run_step(module, model, x, seed))
            optimizer.step()
        return steps

    def test_memory_is_gone_between_release_and_reload(self) -> None:
        size = 64 * 2**20
        storage = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        expected = storage.cpu()
        before = torch.accelerator.memory_allocated(self.device)
        moved = Moved(storage.untyped_storage())
        del storage
        self.assertEqual(torch.accelerator.memory_allocated(self.device), before)
        moved.release()
        self.assertEqual(torch.accelerator.memory_allocated(self.device), before - size)
        moved.reload()
        self.assertEqual(torch.accelerator.memory_allocated(self.device), before)
        self.assertTrue(torch.equal(moved.tensor().cpu(), expected))

    def test_the_ops(self) -> None:
        x = torch.randn(64, 32, 16, device=self.device).permute(2, 0, 1)
        host = torch.ops.remat.offload(x, x.stride())
        torch.ops.remat.release(x, host)
        back = torch.ops.remat.reload(host, x.shape, x.stride(), x.device)
        torch.ops.remat.wait(back)
        self.assertTrue(torch.equal(back, x))
        self.assertEqual(back.stride(), x.stride())

    def test_a_thousand_steps_leak_nothing_and_pin_no_new_memory(self) -> None:
        model, x = stack(128, 3, 64, dropout=0.1, dtype=torch.float32)
        module = remat.optimize(model, (x,), budget=None, policy="offload-all")
        pool = host_tier(x.device).pool
        run_step(module, model, x)
        gc.collect()
        made, held, allocated = pool.made, pool.bytes, torch.accelerator.memory_allocated(self.device)
        for _ in range(1000):
            run_step(module, model, x)
        gc.collect()
        self.assertEqual((pool.made, pool.bytes, pool.in_use_bytes), (made, held, 0))
        self.assertEqual(torch.accelerator.memory_allocated(self.device), allocated)

    def test_an_exception_frees_everything(self) -> None:
        model, x = small(dropout=0.0)
        module = remat.optimize(model, (x,), budget=None, policy="offload-all")
        pool = host_tier(x.device).pool
        run_step(module, model, x)
        gc.collect()
        allocated = torch.accelerator.memory_allocated(self.device)

        def fail(_: torch.Tensor) -> None:
            raise ValueError("in backward")

        parameter = list(model.parameters())[len(list(model.parameters())) // 2]
        handle = parameter.register_hook(fail)
        with self.assertRaisesRegex(ValueError, "in backward"):
            module(x).backward()
        handle.remove()
        gc.collect()
        self.assertEqual(pool.in_use_bytes, 0)
        self.assertEqual(torch.accelerator.memory_allocated(self.device), allocated)
        expected = run_step(remat.optimize(model, (x,), budget=None), model, x)
        self.assert_same(run_step(module, model, x), expected)

    def test_activation_memory_does_not_grow_with_depth(self) -> None:
        if self.device.type != "cuda":
            self.skipTest("sized for fused attention on a GPU")
        room = 400 * 2**20
        for depth in (8, 16):
            with self.subTest(depth=depth):
                self._fits(depth, room)

    def _fits(self, depth: int, room: int) -> None:
        model, x = stack(1024, depth, 2048)
        budget = remat.plan(model, (x,), budget=None).resident_bytes + room
        module = remat.optimize(model, (x,), budget=budget, host_budget="8GiB")
        run_step(module, model, x)
        found = remat.measure(lambda: module(x).backward())
        self.assertLessEqual(found.peak_bytes, budget)
        self.assertLessEqual(found.above_resident_bytes, room)
        self.assertGreater(plan_of(module).host_bytes, 0)
