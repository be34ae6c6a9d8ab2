"""Plans to look at."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

import remat
from tests.models import build, llama, mlp


@functools.cache
def with_recompute() -> remat.Plan:
    """Recompute, no copies."""
    model, kwargs = llama(layers=4)
    return remat.plan(model.train(), (), kwargs, budget=0.5)


@functools.cache
def with_copies() -> remat.Plan:
    """Both, for a device whose copies run beside compute."""
    model, kwargs = build("gpt2")
    return remat.plan(model, (), kwargs, budget=None, host_budget="1GiB", device="h100", policy="offload")


@functools.cache
def with_inductor() -> remat.Plan:
    """Of generated code."""
    torch._dynamo.reset()
    model, x = mlp(dropout=0.0, rows=512)
    module = torch.compile(model, backend="remat", options={"budget": 0.8})
    module(x).sum().backward()
    return remat.plans(module)[0].plan


def data_of(spec: Any) -> Iterator[Any]:
    """All rows in a chart's specification."""
    if isinstance(spec, dict):
        if isinstance(spec.get("values"), list):
            yield spec["values"]
        for value in spec.values():
            yield from data_of(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from data_of(value)
