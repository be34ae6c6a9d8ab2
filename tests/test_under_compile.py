"""torch.compile around what remat has rewritten, and models whose parts were compiled before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import remat
from remat import enabled
from tests.models import Mlp, mlp

pytestmark = pytest.mark.usefixtures("_dynamo")


class Headed(nn.Module):
    """A body that remat may rewrite, and more."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.scale = body, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(x.sin())


def _optimized(body: nn.Module) -> nn.Module:
    return remat.optimize(body, budget=0.8)


def _enabled(body: nn.Module) -> nn.Module:
    remat.enable(body, 0.8)
    return body


def _enabled_by_block(body: nn.Module) -> nn.Module:
    remat.enable(body, 0.9, whole_model=False)
    return body


def _gradients(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Of two steps that add up."""
    model.zero_grad()
    for _ in range(2):
        model(x).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("rewrite", [_optimized, _enabled, _enabled_by_block])
def test_a_model_with_a_rewritten_part(rewrite: Callable[[nn.Module], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """What is enabled runs eagerly in it, and says so; what `optimize` gave is captured when it is called first."""
    enabled._say_uncompiled.cache_clear()
    body, x = mlp(dropout=0.0)
    expected = _gradients(Headed(body), x)
    model = Headed(rewrite(body))
    with caplog.at_level(logging.WARNING, "remat"):
        found = _gradients(torch.compile(model, backend="aot_eager"), x)
    torch.testing.assert_close(found, expected)
    assert ("stays within its budget: what remat.enable" in caplog.text) == (rewrite is not _optimized)


@pytest.mark.parametrize("rewrite", [_optimized, _enabled])
def test_without_a_graph_break_the_reason_is_named(rewrite: Callable[[nn.Module], nn.Module]) -> None:
    body, x = mlp()
    model = torch.compile(Headed(rewrite(body)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call it once before torch\.compile|remat\.enable has rewritten runs eagerly"):
        model(x)


@pytest.mark.parametrize("whole", [True, False])
def test_blocks_that_were_compiled_before(whole: bool) -> None:
    body, x = mlp(dropout=0.0)
    assert isinstance(body, Mlp)
    expected = _gradients(body, x)
    calls: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph

    for block in body.layers:
        block.compile(backend=backend)
    remat.enable(body, 0.9, whole_model=whole)
    torch.testing.assert_close(_gradients(body, x), expected)
    assert not calls
