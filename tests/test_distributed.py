"""Two processes, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import remat
from remat import distributed
from tests.models import mlp

_ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


_CASES = (
    "ddp", "fsdp", "fsdp_later", "other_model", "other_shape", "wrong_setting", "fault", "no_room",
    "fsdp_other_model", "fsdp_no_room", "fsdp_whole", "tensor_parallel", "tensor_parallel_blocks",
    "pipeline",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks says of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*launch, "tests/distributed_steps.py", str(folder), *_CASES]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "unwaited collective" not in done.stderr  # planning runs ops by themselves to see what they allocate, but not these
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_ddp_with_one_plan(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp"] for rank in ranks)
    assert first["plan"] == second["plan"]
    for rank in (first, second):
        assert rank["own"] < 1e-6
        assert rank["averaged"] < 1e-6
        assert rank["hooks"] == [2]  # once for each of the two steps
        assert rank["dropped"] > 0
        assert rank["over"] <= 0
        assert rank["losses"] == pytest.approx(rank["expected"], rel=1e-3)
        assert rank["losses"][-1] < 0.9 * rank["losses"][0]
    assert first["losses"] != second["losses"]


def test_fsdp_block_by_block(ranks: list[dict[str, Any]]) -> None:
    for rank in (rank["fsdp"] for rank in ranks):
        assert rank["apart"] < 1e-6
        assert rank["dropped"] > 0
        assert max(rank["over"]) <= 0
        assert all(rank["budget"])
        assert rank["resident"] < 0.6 * rank["whole"]
        assert rank["losses"] == rank["expected"]
        assert rank["losses"][-1] < 0.9 * rank["losses"][0]


def test_fsdp_applied_later(ranks: list[dict[str, Any]]) -> None:
    for rank in (rank["fsdp_later"] for rank in ranks):
        assert rank["same"]
        assert rank["peaks"][1] < rank["peaks"][2]


def test_pipeline_stages_with_budgets_of_their_own(ranks: list[dict[str, Any]]) -> None:
    for rank in (rank["pipeline"] for rank in ranks):
        assert rank["apart"] < 1e-6
        assert rank["dropped"] > 0
        assert rank["over"] <= 0


def test_tensor_parallel_compiled(ranks: list[dict[str, Any]]) -> None:
    for rank in (rank["tensor_parallel"] for rank in ranks):
        assert rank["apart"] < 1e-6
        assert rank["dropped"] > 0
        assert rank["peaks"][1] <= rank["budget"] < rank["peaks"][0]


@pytest.mark.parametrize(
    ("case", "error", "texts"),
    [
        ("other_model", "RematError", ("ranks 0 and 1 differ", "on rank 1")),
        ("other_shape", "RematError", ("args[0] 8x32 float32", "args[0] 9x32 float32")),
        ("wrong_setting", "RematError", ("on rank 1: ", "'polcy'")),
        ("fault", "RematError", ("on rank 1: AttributeError",)),
        ("no_room", "BudgetError", ("on rank 1: ", "smallest")),
        ("fsdp_other_model", "RematError", ("ranks 0 and 1 differ",)),
        ("fsdp_no_room", "BudgetError", ("on rank 1: ", "smallest")),
        ("fsdp_whole", "RematError", ("optimize_blocks",)),
        ("tensor_parallel_blocks", "CaptureError", ("layers.0.1.weight is a DTensor", 'backend="remat"')),
    ],
)
def test_a_rank_that_differs_stops_both(case: str, error: str, texts: tuple[str, ...], ranks: list[dict[str, Any]]) -> None:
    for said in (rank[case] for rank in ranks):
        assert said["error"] == error
        assert all(text in said["text"] for text in texts), said["text"]


def test_it_takes_the_arguments_of_plan(tmp_path: Path) -> None:
    model, x = mlp()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plan = distributed.plan(model, (x,), budget=0.8, device="h100", dynamic_shapes={"x": {0: "rows"}})
    finally:
        dist.destroy_process_group()
    assert plan.device == "h100"
    assert plan.peak_bytes_at(rows=64) == pytest.approx(plan.peak_bytes, rel=1e-3)


def test_alone_it_is_an_error() -> None:
    model, x = mlp()
    with pytest.raises(remat.RematError, match="init_process_group"):
        distributed.plan(model, (x,), budget=0.8)
