"""Tools know a model's plan, whichever way remat came to it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import remat
from tests.models import mlp

WAYS = ["optimize", "enable", "blocks", "compile"]


def trained(way: str) -> tuple[Any, torch.Tensor]:
    model, x = mlp(rows=64)
    if way == "optimize":
        return remat.optimize(model, budget=0.8), x
    if way == "compile":
        return torch.compile(model, backend="remat", options={"budget": 0.8, "compiler": "eager"}), x
    return remat.enable(model, 0.8, whole_model=way == "enable"), x


def plan_of(model: Any, way: str) -> Any:
    return remat.plans(model)[0].plan if way == "compile" else remat.plan_of(model)


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("way", WAYS)
def test_tools_find_the_plan(way: str, tmp_path: Path) -> None:
    model, x = trained(way)
    calls = (remat.explain, lambda m: remat.verify(m, args=()), remat.to_dot, lambda m: remat.report(m, tmp_path / "early.zip"))
    for tool in calls:
        with pytest.raises(remat.RematError, match="call the m"):
            tool(model)
    model(x).backward()
    model.zero_grad()
    plan = plan_of(model, way)
    assert remat.explain(model) is plan
    assert remat.verify(model, args=(x,)).plan is plan
    text = remat.to_dot(model)
    assert text.startswith("digraph remat {")
    assert "aten.gelu" in text
    with zipfile.ZipFile(remat.report(model, tmp_path / "report.zip")) as file:
        assert remat.Plan.from_json(file.read("plan_0.json").decode()) == plan
        assert file.read("graph_0.dot").decode() == text
        assert any(b"aten.gelu" in file.read(name) for name in file.namelist() if name.endswith(".txt"))
    assert not (tmp_path / "early.zip").exists()


def test_a_plain_model_has_no_plan(tmp_path: Path) -> None:
    model, x = mlp()
    for tool in (remat.to_dot, lambda m: remat.report(m, tmp_path / "report.zip"), lambda m: remat.verify(m, args=(x,))):
        with pytest.raises(remat.RematError, match="there is no plan"):
            tool(model)


@pytest.mark.usefixtures("_dynamo")
def test_several_graphs_are_not_explained_as_one() -> None:
    model, x = mlp(rows=64)
    compiled = torch.compile(model, backend="remat", options={"compiler": "eager"}, dynamic=False)
    for rows in (64, 32):
        compiled(x[:rows]).backward()
    with pytest.raises(remat.RematError, match=r"2 graphs.*remat.plans"):
        remat.explain(compiled)
    assert remat.to_dot(compiled).count("subgraph") == 4
