"""Every example runs, a few steps of it, and keeps what it promises."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_EXAMPLES = Path(__file__).parent.parent / "examples"
_STEPS = "6"
_TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
_LINE = re.compile(
    r"([\d.]+) MiB with everything saved, ([\d.]+) MiB as planned, ([\d.]+) MiB measured; loss ([\d.]+) to ([\d.]+)"
)


def check(printed: str) -> None:
    found = _LINE.search(printed)
    assert found is not None, printed
    everything, planned, measured, first, last = map(float, found.groups())
    assert measured <= planned < everything
    assert last < first


@pytest.mark.filterwarnings("ignore")  # the trainers' own
@pytest.mark.parametrize("name", ["plain_loop", "trainer", "lora", "lightning_fit"])
def test_an_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, _STEPS])
    monkeypatch.syspath_prepend(str(_EXAMPLES))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(_EXAMPLES / f"{name}.py"), run_name="__main__")
    check(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("accelerate_loop", ()), ("ddp", _TORCHRUN), ("fsdp", _TORCHRUN)],
)
def test_an_example_that_needs_processes_of_its_own(name: str, launcher: tuple[str, ...]) -> None:
    path = os.pathsep.join([str(_EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(_EXAMPLES / f"{name}.py"), _STEPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_all_are_here() -> None:
    names = {path.stem for path in _EXAMPLES.glob("*.py")}
    loops = {"plain_loop", "trainer", "lora", "accelerate_loop", "lightning_fit", "ddp", "fsdp"}
    assert names == {"demo", "quickstart", "small", *loops}
