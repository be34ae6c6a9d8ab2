"""What the tests on an accelerator share."""

from __future__ import annotations

import gc
import os
import unittest
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it products may vary in their bits

import torch
from torch import nn

import remat
from benchmarks.stack import accelerator, stack

DEVICE = accelerator()


class Case(unittest.TestCase):
    """A test case that is skipped where there is no accelerator. Kernels are deterministic, so that bits can be compared."""

    device: torch.device

    @classmethod
    def setUpClass(cls) -> None:
        if DEVICE is None:
            raise unittest.SkipTest("needs an accelerator")
        cls.device = DEVICE
        torch.use_deterministic_algorithms(True)

    @classmethod
    def tearDownClass(cls) -> None:
        torch.use_deterministic_algorithms(False)

    def setUp(self) -> None:
        torch.compiler.reset()
        gc.collect()

    def assert_same(self, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        """Bitwise."""
        self.assertEqual(len(found), len(expected))
        for a, b in zip(found, expected, strict=True):
            self.assertTrue(torch.equal(a, b), f"differs by up to {(a.double() - b.double()).abs().max()}")

    def assert_close(self, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> None:
        for a, b in zip(found, expected, strict=True):
            error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)
            self.assertLessEqual(error.item(), tolerance)


def small(dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    """A few blocks: large enough that a GPU's kernels count, smaller elsewhere."""
    width, depth, length = (512, 6, 1024) if DEVICE is not None and DEVICE.type == "cuda" else (64, 3, 128)
    return stack(width, depth, length, dropout=dropout, dtype=dtype)


def run_step(call: Callable[..., torch.Tensor], owner: nn.Module, x: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """Loss and gradients of a step, on the host; the random state is disturbed between forward and backward."""
    for parameter in owner.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    torch.manual_seed(seed)
    loss = call(x)
    torch.rand(5, device=x.device)
    loss.backward()
    return [t.detach().cpu() for t in (loss, *(p.grad for p in owner.parameters() if p.grad is not None))]


def peak_of(call: Callable[..., torch.Tensor], owner: nn.Module, x: torch.Tensor) -> int:
    """The allocator's peak during a warm step, all that is on the device included."""
    run_step(call, owner, x)
    return remat.measure(lambda: run_step(call, owner, x)).peak_bytes


def plan_of(module: Any) -> remat.Plan:
    plan = module.plan
    assert isinstance(plan, remat.Plan)
    return plan
