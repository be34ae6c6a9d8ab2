"""Rewritten graphs in DOT."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

import remat
from tests.models import build, llama


def names(text: str) -> set[str]:
    return set(re.findall(r'^ *"([^"]+)" \[label', text, re.MULTILINE))


def test_a_module_with_its_regions() -> None:
    model, kwargs = llama(layers=2)
    module = remat.optimize(model.train(), (), kwargs, budget=0.6)
    text = remat.to_dot(module)
    assert text.startswith("digraph remat {")
    assert text.count("subgraph") == len(module.plan.regions) > 0
    regions = [getattr(module, f"region_{i}") for i in range(len(module.plan.regions))]
    assert len(names(text)) == sum(len(graph.graph.nodes) for graph in (module, *regions))
    ends = set(re.findall(r'^ *"([^"]+)" -> "([^"]+)"', text, re.MULTILINE))
    assert {end for pair in ends for end in pair} <= names(text)
    assert "#fed7aa" in text
    assert "model.layers.0.mlp" in text


@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_plan() -> None:
    model, kwargs = build("llama")
    compiled = torch.compile(model, backend="remat", options={"budget": 0.7, "compiler": "eager"})
    compiled(**kwargs)
    (graph,) = remat.plans(compiled)
    text = remat.to_dot(graph)
    assert text.count("subgraph") == 2
    assert "style=dashed" in text
    assert len(names(text)) == len(graph.forward.graph.nodes) + len(graph.backward.graph.nodes)


def test_a_module_without_a_graph_yet_is_refused() -> None:
    model, _ = build("llama")
    with pytest.raises(remat.RematError, match="nothing is captured yet"):
        remat.to_dot(remat.optimize(model, budget=0.5))


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_it() -> None:
    model, kwargs = llama(layers=1)
    text = remat.to_dot(remat.optimize(model.train(), (), kwargs, budget=0.5))
    subprocess.run(["dot", "-Tcanon"], input=text, text=True, check=True, capture_output=True)
