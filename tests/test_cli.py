"""The command line, each command from its arguments to what it prints, writes and returns."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import remat
from remat import devices
from remat.cli.app import _device_here, run
from remat.devices import DEVICES

SIZES = ["--set", "hidden_size=64", "--set", "num_hidden_layers=3", "--set", "num_attention_heads=4", "--set", "vocab_size=96"]
LLAMA = ["llama", *SIZES, "--set", "intermediate_size=128", "--set", "num_key_value_heads=2", "--batch", "2", "--seq", "64"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints, when it ends with `code`."""
    found = run(arguments)
    out, err = capsys.readouterr()
    assert found == code, err
    return out + err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that a wrong question gets."""
    text = answer(capsys, *arguments, code=code)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two plans of one model."""
    folder = tmp_path_factory.mktemp("plans")
    paths = folder / "a.json", folder / "b.json"
    for path, budget in zip(paths, ("0.6", "none"), strict=True):
        assert run(["plan", *LLAMA, "--budget", budget, "-o", str(path)]) == 0
    return paths


def test_plan_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = answer(capsys, "plan", *LLAMA, "--budget", "0.6", "--optimizer", "adamw")
    assert "LlamaForCausalLM (input_ids 2×64, labels 2×64) on cpu" in text
    assert "fits in " in text
    for kind in ("parameters", "optimizer", "activations", "working set"):
        assert kind in text
    assert "more for recompute" in text


@pytest.mark.slow
def test_plan_that_does_not_fit_names_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "plan", *LLAMA, "--budget", "1MiB", code=1)
    assert "the smallest needs" in text
    found = json.loads(answer(capsys, "plan", *LLAMA, "--budget", "1MiB", "--json", code=1))
    again = json.loads(answer(capsys, "plan", *LLAMA, "--budget", str(found["minimum_bytes"]), "--json"))
    assert again["peak_bytes"] <= found["minimum_bytes"]


def test_plan_as_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = remat.Plan.from_json(answer(capsys, "plan", *LLAMA, "--json"))
    assert plan.model == "LlamaForCausalLM"
    assert plan.at_peak()["optimizer"] >= 2 * plan.at_peak()["parameters"]


def test_plan_shows_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    text = answer(capsys, "plan", *LLAMA, "--budget", "0.6", "--values")
    assert "recompute" in text
    assert "model.layers." in text


@pytest.mark.slow
def test_plan_writes_each_form(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [tmp_path / f"step{suffix}" for suffix in (".json", ".html", ".trace", ".pickle")]
    outputs = [part for path in paths for part in ("-o", str(path))]
    answer(capsys, "plan", *LLAMA, "--budget", "0.6", *outputs)
    plan = remat.Plan.from_json(paths[0].read_text())
    assert "Memory against time" in paths[1].read_text()
    assert paths[2].read_text() == plan.to_trace()
    assert pickle.loads(paths[3].read_bytes()) == pickle.loads(plan.to_snapshot())


@pytest.mark.slow
def test_a_device_a_dtype_and_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--device", "rtx4090", "--dtype", "bf16", "--lora", "r=4,targets=q_proj,v_proj", "--json"]
    plan = remat.Plan.from_json(answer(capsys, "plan", *LLAMA, *more))
    assert plan.device == "rtx4090"
    full = remat.Plan.from_json(answer(capsys, "plan", *LLAMA, "--json"))
    assert plan.at_peak()["parameters"] < 0.7 * full.at_peak()["parameters"]
    assert plan.at_peak()["optimizer"] < 0.2 * full.at_peak()["optimizer"]


@pytest.mark.parametrize("name", ["config.json", ""])
def test_a_local_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    plan = remat.Plan.from_json(answer(capsys, "plan", str(tmp_path / name), "--batch", "2", "--seq", "32", "--json"))
    assert plan.model == "GPT2LMHeadModel"
    assert plan.inputs[0].shape == (2, 32)


@pytest.mark.parametrize(
    ("name", "sizes", "model"),
    [
        ("bert", [*SIZES, "--set", "intermediate_size=128"], "BertForMaskedLM"),
        ("t5", ["--set", "d_model=64", "--set", "num_layers=2", "--set", "d_ff=128"], "T5ForConditionalGeneration"),
        ("vit", [*SIZES[:6], "--set", "image_size=32", "--set", "patch_size=8"], "ViTForImageClassification"),
    ],
)  # fmt: skip
def test_other_architectures(capsys: pytest.CaptureFixture[str], name: str, sizes: list[str], model: str) -> None:
    plan = remat.Plan.from_json(answer(capsys, "plan", name, *sizes, "--batch", "2", "--json"))
    assert plan.model == model
    assert plan.inputs[0].shape[0] == 2


def test_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    plan = remat.Plan.from_json(answer(capsys, "plan", "tests.cli_models:mlp", "--batch", "8", "--set", "width=32", "--json"))
    assert plan.inputs[0].shape == (8, 32)
    assert "Bilinear" in answer(capsys, "plan", "tests.cli_models:several")


def test_timm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: the real one brings torchvision, whose build has to be that of torch."""

    def create_model(name: str, pretrained: bool) -> nn.Module:
        if name != "tiny" or pretrained:
            raise RuntimeError("Unknown model")
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
        model.default_cfg = {"input_size": (3, 8, 8)}  # type: ignore[assignment]
        return model

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    plan = remat.Plan.from_json(answer(capsys, "plan", "timm:tiny", "--batch", "3", "--json"))
    assert plan.inputs[0].shape == (3, 3, 8, 8)
    assert "timm does not make 'huge'" in refusal(capsys, "plan", "timm:huge")
    assert "takes images" in refusal(capsys, "plan", "timm:tiny", "--seq", "3")


def test_what_should_not_happen_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remat, "plan", lambda **_: 1 / 0)
    assert "this should not happen: ZeroDivisionError" in refusal(capsys, "plan", "tests.cli_models:mlp", code=3)
    monkeypatch.setenv("REMAT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run(["plan", "tests.cli_models:mlp"])


def test_frontier(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pictures = {"svg": b"<svg", "png": b"\x89PNG", "html": b"<!DOCTYPE html>"}
    for suffix, start in pictures.items():
        path = tmp_path / f"frontier.{suffix}"
        assert "peak" in answer(capsys, "frontier", "tests.cli_models:mlp", "--points", "4", "-o", str(path))
        assert path.read_bytes().startswith(start)
    rows = json.loads(answer(capsys, "frontier", *LLAMA, "--points", "4", "--json"))
    peaks, times = [row["peak_bytes"] for row in rows], [row["step_us"] for row in rows]
    assert peaks == sorted(peaks, reverse=True)
    assert times == sorted(times)
    assert all(sum(row["at_peak"].values()) == row["peak_bytes"] for row in rows)


def test_a_frontier_within_nothing_names_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "frontier", "tests.cli_models:mlp", "--budget", "1000", "--json", code=1))
    assert "the smallest needs" in found["error"]
    least = str(found["minimum_bytes"])
    (row,) = json.loads(answer(capsys, "frontier", "tests.cli_models:mlp", "--budget", least, "--points", "2", "--json"))
    assert row["peak_bytes"] <= found["minimum_bytes"]


def test_a_gpu_here_that_was_measured_is_planned_for_as_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert _device_here() == "h100"
    measured = dataclasses.replace(devices._assumed(torch.device("cuda")), bytes_per_us=1.0)
    path = devices.cache_file(torch.device("cuda"))
    path.parent.mkdir()
    path.write_text(json.dumps(dataclasses.asdict(measured)))
    devices._read.cache_clear()
    assert _device_here() == "h100"
    assert devices.device_profile("h100") == dataclasses.replace(measured, is_here=False)
    assert devices.device_profile("h200") is DEVICES["h200"]


@pytest.mark.slow
def test_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert " fits in 8.00 MiB" in answer(capsys, "fit", "tests.cli_models:mlp", "--budget", "8MiB")
    small = [*LLAMA, "--set", "num_hidden_layers=1", "--batch", "1"]
    found = json.loads(answer(capsys, "fit", *small, "--budget", "1MiB", "--dim", "seq", "--multiple-of", "16", "--json"))
    assert found["size"] % 16 == 0
    assert found["plan"]["peak_bytes"] <= 2**20 < found["next_bytes"]


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    text = answer(capsys, "devices")
    assert all(name in text for name in DEVICES)
    assert [row["name"] for row in json.loads(answer(capsys, "devices", "--json"))] == list(DEVICES)


def test_explain(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    plan = remat.Plan.from_json(files[0].read_text())
    dropped = next(name for name, decision in plan.decisions.items() if decision is remat.Decision.RECOMPUTE)
    text = answer(capsys, "explain", str(files[0]), dropped)
    assert text.startswith(f"{dropped}: recompute, since: ")
    assert "chosen  recompute" in text
    found = json.loads(answer(capsys, "explain", str(files[0]), dropped, "--json"))
    assert [way["decision"] for way in found["alternatives"]] == ["save", "recompute", "offload"]


def test_diff(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    a, b = map(str, files)
    assert "all values are treated alike" in answer(capsys, "diff", a, a)
    assert "recompute → save" in answer(capsys, "diff", a, b, code=1)
    found = json.loads(answer(capsys, "diff", a, b, "--json", code=1))
    assert found["figures"]["recompute_us"][1] == 0
    assert set(map(tuple, found["decisions"].values())) >= {("recompute", "save")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "Missing argument"),
        (["nope"], "No such command 'nope'"),
        (["plan", "gpt2", "--bad"], "No such option: --bad"),
        (["plan", "gpt2", "--batch", "x"], "--batch"),
        (["plan", "gpt2", "--batch", "0"], "--batch 0 must be at least 1"),
        (["plan", "gpt2", "--seq", "5000"], "this model has 1024 positions"),
        (["plan", "gpt2", "--budget", "lots"], "'lots' is not a size"),
        (["plan", "gpt2", "--budget", "1.5"], "a share"),
        (["plan", "gpt2", "--device", "abacus"], "device='abacus' is unknown"),
        (["plan", "gpt2", "--dtype", "int4"], "--dtype int4 is unknown"),
        (["plan", "gpt2", "--optimizer", "lion"], "--optimizer lion is unknown"),
        (["plan", "gpt2", "--policy", "luck"], "policy='luck'"),
        (["plan", "gpt2", "--lora", "q=3"], "--lora q is unknown"),
        (["plan", "gpt2", "--lora", "r=4,targets=nowhere"], "--lora r=4,targets=nowhere: "),
        (["plan", "gpt2", "--set", "n_embd"], "write it as NAME=VALUE"),
        (["plan", "gpt2", "--set", "width=3"], "GPT2Config has no such size"),
        (["plan", "gpt2", "--set", "n_embd=7"], "must be divisible"),
        (["plan", "gpt2", "-o", "plan.docx"], "the suffix says what to write"),
        (["plan", "gpt2", "-o", "/nowhere/plan.json", "--set", "n_layer=1"], "/nowhere/plan.json"),
        (["plan", "lama"], "architecture of transformers; there are llama"),
        (["plan", "vit", "--seq", "3"], "takes images"),
        (["plan", "wav2vec2"], "package.module:function"),
        (["plan", "tests/cli_models.py"], "is no configuration"),
        (["plan", "tests.nowhere:mlp"], "cannot be imported"),
        (["plan", "tests.cli_models:nothing"], "cannot be imported"),
        (["plan", "tests.cli_models:no_function"], "is no function"),
        (["plan", "tests.cli_models:fails"], "failed: KeyError"),
        (["plan", "tests.cli_models:returns_nothing"], "must return a model and its inputs"),
        (["plan", "tests.cli_models:mlp", "--seq", "3"], "takes no 'seq'"),
        (["frontier", "gpt2", "-o", "picture.gif"], ".svg, .png, .html"),
        (["frontier", "gpt2", "--points", "1"], "--points"),
        (["fit", "tests.cli_models:mlp", "--budget", "0.5"], "grows with the step"),
        (["fit", "tests.cli_models:mlp", "--budget", "1GiB", "--dim", "depth"], "depth"),
        (["explain", "nowhere.json", "mm"], "nowhere.json"),
        (["explain", "README.md", "mm"], "README.md: this is not a plan"),
        (["diff", "README.md", "README.md"], "README.md: this is not a plan"),
    ],
)
def test_what_cannot_be_asked_gets_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refusal(capsys, *arguments)


def test_an_unknown_value_is_told_with_close_ones(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    assert "the plan has no value 'sillu'; there are silu" in refusal(capsys, "explain", str(files[0]), "sillu")


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = json.loads(answer(capsys, "plan", "lama", "--json", code=2))
    assert "there is no model" in found["error"]


@pytest.mark.parametrize("command", [[], ["plan"], ["frontier"], ["fit"], ["devices"], ["explain"], ["diff"]])
def test_help_fits_one_screen(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    lines = answer(capsys, *command, "--help").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_as_a_program() -> None:
    found = subprocess.run([sys.executable, "-m", "remat", "devices", "--json"], capture_output=True, text=True, check=True)
    assert len(json.loads(found.stdout)) == len(DEVICES)
    wrong = subprocess.run([sys.executable, "-m", "remat", "plan", "lama"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
