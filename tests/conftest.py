"""Shared set-up: quiet profiler, two threads (kernels' scratch memory depends on it), a fresh Dynamo for door 2."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["KINETO_LOG_LEVEL"] = "99"  # before torch is imported: the profiler reports its start and stop otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """No compiled graphs from other tests, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
