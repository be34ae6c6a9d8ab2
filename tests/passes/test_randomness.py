"""Random ops are told by tag and arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from remat.passes.randomness import is_random

aten = torch.ops.aten


def node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, tuple(x if a is ... else a for a in args), kwargs)


RANDOM = {
    "native_dropout": (aten.native_dropout.default, (..., 0.1, True), {}),
    "bernoulli": (aten.bernoulli.p, (..., 0.5), {}),
    "bernoulli_": (aten.bernoulli_.float, (..., 0.5), {}),
    "rand_like": (aten.rand_like.default, (...,), {}),
    "randn": (aten.randn.default, ([2, 3],), {}),
    "randint": (aten.randint.default, (5, [2]), {}),
    "multinomial": (aten.multinomial.default, (..., 1), {}),
    "normal_": (aten.normal_.default, (...,), {}),
    "sdpa": (aten.scaled_dot_product_attention.default, (..., ..., ..., None, 0.1), {}),
    "sdpa by keyword": (aten.scaled_dot_product_attention.default, (..., ..., ...), {"dropout_p": 0.1}),
    "flash": (aten._scaled_dot_product_flash_attention.default, (..., ..., ..., 0.2), {}),
    "rrelu": (aten.rrelu_with_noise.default, (..., ...), {"training": True}),
}
CALM = {
    "add": (aten.add.Tensor, (..., ...), {}),
    "mm": (aten.mm.default, (..., ...), {}),
    "sdpa without dropout": (aten.scaled_dot_product_attention.default, (..., ..., ...), {}),
    "sdpa with p=0": (aten.scaled_dot_product_attention.default, (..., ..., ..., None, 0.0), {}),
    "flash without dropout": (aten._scaled_dot_product_flash_attention.default, (..., ..., ...), {}),
    "cpu flash without dropout": (aten._scaled_dot_product_flash_attention_for_cpu.default, (..., ..., ...), {}),
    "a Python function": (len, (...,), {}),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random(name: str) -> None:
    target, args, kwargs = RANDOM[name]
    assert is_random(node(target, *args, **kwargs))


@pytest.mark.parametrize("name", CALM)
def test_not_random(name: str) -> None:
    target, args, kwargs = CALM[name]
    assert not is_random(node(target, *args, **kwargs))


def test_an_unknown_probability_counts_as_random() -> None:
    graph = fx.Graph()
    x, p = graph.placeholder("x"), graph.placeholder("p")
    assert is_random(graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x, None, p)))
