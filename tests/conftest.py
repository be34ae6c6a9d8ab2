"""Shared set-up: quiet profiler, one thread (test processes run side by side, and kernels' scratch memory depends on it), a
fresh Dynamo for door 2."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

os.environ["KINETO_LOG_LEVEL"] = "99"  # before torch is imported: the profiler reports its start and stop otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # figures measured on this machine would change plans

import pytest

_NOT_OURS = (
    # torch.utils.mkldnn, which importing Inductor brings in, still uses torch.jit
    r"ignore:`torch\.jit\.:DeprecationWarning",
    # transformers asks itself about its own old name while peft wraps a model
    r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # Dynamo asks every input of a graph for its gradient, those that come from an earlier graph too
    r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in _NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules stay: garbage collections that walk them are an eighth of the tests' time
    gc.set_threshold(20_000, 20, 20)  # those that are left, another tenth


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def _dynamo() -> Iterator[None]:
    """No compiled graphs from other tests, and none left behind."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
