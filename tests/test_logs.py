"""What is logged of plans: TORCH_LOGS names remat like a part of torch, TORCH_TRACE gets an artifact for tlparse."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import remat
from tests.models import llama

STEP = """
import torch, remat
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()) for _ in range(4)))
compiled = torch.compile(model, backend="remat", options={"compiler": "eager"})
compiled(torch.randn(8, 16)).sum().backward()
"""


def stderr_of(**environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return found.stderr


@pytest.mark.slow
def test_torch_logs_shows_plans() -> None:
    said = stderr_of(TORCH_LOGS="remat")
    assert "budget none: peak" in said
    assert "aten.gelu" not in said
    assert "module" in stderr_of(TORCH_LOGS="+remat")


def test_tlparse_finds_the_plan(tmp_path: Path) -> None:
    stderr_of(TORCH_TRACE=str(tmp_path))
    (log,) = tmp_path.iterdir()
    lines = log.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"remat_plan"' in line)
    payload = []
    for line in lines[at + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line[1:])
    plan = remat.Plan.from_json("\n".join(payload))
    assert plan.door == "compiled"
    assert '"encoding": "json"' in lines[at]
    assert json.loads(lines[at][lines[at].index("{") :])["artifact"]["name"] == "remat_plan"


def test_door_1_logs_too(caplog: pytest.LogCaptureFixture) -> None:
    model, kwargs = llama(layers=1)
    with caplog.at_level(logging.INFO, logger="remat"):
        module = remat.optimize(model.train(), (), kwargs, budget=None)
    assert module.plan is not None
    assert any("budget none: peak" in message for message in caplog.messages)
