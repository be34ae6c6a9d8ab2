"""Reports for bugs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import remat
from tests.models import build, llama

MARK = 1234567.0  # a weight that would be recognised


def marked() -> tuple[Any, dict[str, Any]]:
    model, kwargs = llama(layers=2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(MARK)
    return model.train(), kwargs


def read(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_a_module(tmp_path: Path) -> None:
    model, kwargs = marked()
    module = remat.optimize(model, (), kwargs, budget=0.6)
    path = remat.report(module, tmp_path / "report.zip")
    files = read(path)
    assert remat.Plan.from_json(files["plan_0.json"].decode()) == module.plan
    assert files["plan_0.txt"].decode() == module.plan.summary()
    assert json.loads(files["versions.json"])["packages"]["torch"]
    assert files["graph_0.dot"].startswith(b"digraph")
    assert b"aten.silu" in b"".join(files.values())
    assert len(files) == 4 + 1 + len(module.plan.regions)


@pytest.mark.usefixtures("_dynamo")
def test_a_compiled_model(tmp_path: Path) -> None:
    model, kwargs = build("llama")
    compiled = torch.compile(model, backend="remat", options={"budget": 0.8, "compiler": "eager"})
    compiled(**kwargs)
    files = read(remat.report(compiled, tmp_path / "report.zip"))
    assert {"graph_0_forward.txt", "graph_0_backward.txt", "plan_0.json"} <= files.keys()


def test_no_weights_no_data_and_no_paths(tmp_path: Path) -> None:
    model, kwargs = marked()
    kwargs["input_ids"].fill_(77)
    files = read(remat.report(remat.optimize(model, (), kwargs, budget=0.6), tmp_path / "report.zip"))
    everything = b"".join(files.values())
    assert str(MARK).encode() not in everything
    assert torch.tensor(MARK).numpy().tobytes() not in everything
    assert b"77, 77" not in everything
    assert str(Path.home()).encode() not in everything
    assert str(Path(remat.__file__).parent).encode() not in everything
    for data in files.values():
        data.decode()  # all of it text


def test_what_has_no_plan_is_refused(tmp_path: Path) -> None:
    model, _ = llama(layers=1)
    with pytest.raises(remat.RematError, match="there is no plan yet"):
        remat.report(remat.optimize(model, budget=None), tmp_path / "report.zip")
    with pytest.raises(remat.RematError, match="there is no plan for this LlamaForCausalLM"):
        remat.report(model, tmp_path / "report.zip")
    assert not (tmp_path / "report.zip").exists()
