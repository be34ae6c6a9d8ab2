"""The commands. Each prints for people, or with --json one JSON value for programs; messages and progress go to stderr.

Exit codes: 0 done, 1 the answer is no (nothing fits, or two plans differ), 2 the question is wrong, 3 something
failed that should not.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import remat
from remat.alternatives import diff as compare
from remat.alternatives import explain_value
from remat.cli import show
from remat.cli.models import Request, build
from remat.devices import DEVICES, profile_of
from remat.errors import BudgetError, RematError
from remat.plan import Plan

app = typer.Typer(
    help="Plan training steps for a memory budget: does it fit, with which batch, and what does it cost.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_out, _err = Console(highlight=False), Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="a config.json or its folder, an architecture, timm:NAME, or module:function")]
Batch = Annotated[int | None, typer.Option(help="samples in a batch")]
Seq = Annotated[int | None, typer.Option(help="tokens in a sample")]
Sizes = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a size of the architecture; may repeat")]
Dtype = Annotated[str | None, typer.Option(help="of parameters: fp32, bf16 or fp16")]
Lora = Annotated[str | None, typer.Option(help="r=16,targets=q_proj,v_proj")]
Optimizer = Annotated[str, typer.Option(help="adamw, adam, sgd, momentum, adafactor, none")]
Device = Annotated[str | None, typer.Option(help="one of `remat devices`; default: this GPU, or cpu")]
Host = Annotated[str | None, typer.Option(help="host memory for activations: 64GiB, 50%")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON value on stdout")]
Budget = Annotated[str, typer.Option(help="24GiB, bytes, 80%, 0.4 of activations, auto, none")]


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that models come from
            return int(app(list(arguments) or ["--help"], standalone_mode=False) or 0)
    except BudgetError as error:
        code = 2 if error.minimum_bytes is None else 1
        return _failed(arguments, error, code, minimum_bytes=error.minimum_bytes, where=error.where)
    except (RematError, _UsageError, OSError) as error:
        return _failed(arguments, error, 2)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:  # a fault of remat's, or of a library that the model comes from
        if os.environ.get("REMAT_TRACEBACK"):
            raise
        hint = "REMAT_TRACEBACK=1 shows where"
        return _failed(arguments, RematError(f"this should not happen: {type(error).__name__}: {error} ({hint})"), 3)


def _failed(arguments: Sequence[str], error: Exception, code: int, **more: Any) -> int:
    text = error.format_message() if isinstance(error, _UsageError) else str(error)
    line = " ".join(text.split())
    if "--json" in arguments:
        print(json.dumps({"error": line, **more}))
    else:
        _err.print(f"error: {line}", markup=False, soft_wrap=True)
    return code


@app.command()
def plan(
    model: Model,
    budget: Budget = "auto",
    batch: Batch = None,
    seq: Seq = None,
    device: Device = None,
    dtype: Dtype = None,
    lora: Lora = None,
    optimizer: Optimizer = "adamw",
    host_budget: Host = None,
    policy: Annotated[str, typer.Option(help="auto, blocks, every-2, sqrt, selective, offload")] = "auto",
    sizes: Sizes = None,
    values: Annotated[bool, typer.Option("--values", help="every value, and what becomes of it")] = False,
    output: Annotated[list[Path] | None, typer.Option("-o", help="NAME.json, .html, .trace or .pickle; may repeat")] = None,
    as_json: AsJson = False,
) -> None:
    """Does a step fit, what does it take, and what becomes of its memory?"""
    outputs = output or []
    for path in outputs:
        show.check_suffix(path)
    around: list[Plan] = []
    with _stages() as stage:
        question = _question(stage, Request(model, batch, seq, dtype, lora, optimizer, sizes or ()), device, host_budget)
        found = remat.plan(**question, budget=_budget(budget), policy=policy)
        if any(path.suffix == ".html" for path in outputs):
            stage("the plans around it")
            around = remat.frontier(**question)
        for path in outputs:
            stage(f"writing {path}")
            show.write(found, path, around)
    if as_json:
        print(found.to_json(), end="")
    elif values:
        print(found.summary())
    else:
        show.plan(_out, found)


@app.command()
def frontier(
    model: Model,
    budget: Budget = "none",
    batch: Batch = None,
    seq: Seq = None,
    device: Device = None,
    dtype: Dtype = None,
    lora: Lora = None,
    optimizer: Optimizer = "adamw",
    host_budget: Host = None,
    points: Annotated[int, typer.Option(help="plans to try", min=2)] = 12,
    sizes: Sizes = None,
    output: Annotated[Path | None, typer.Option("-o", help="a picture: .svg, .png or .html")] = None,
    as_json: AsJson = False,
) -> None:
    """The trade-off between memory and time, from the fastest plan to the smallest."""
    if output is not None:
        show.check_picture(output)
    with _stages() as stage:
        question = _question(stage, Request(model, batch, seq, dtype, lora, optimizer, sizes or ()), device, host_budget)
        plans = remat.frontier(**question, budget=_budget(budget), points=points)
        if output is not None:
            show.picture(plans, output)
    if as_json:
        print(json.dumps([show.figures(found) for found in plans]))
    else:
        show.frontier(_out, plans)


@app.command()
def fit(
    model: Model,
    budget: Budget = "auto",
    dim: Annotated[str, typer.Option(help="batch or seq")] = "batch",
    multiple_of: Annotated[int, typer.Option(help="only multiples of this", min=1)] = 1,
    batch: Batch = None,
    seq: Seq = None,
    device: Device = None,
    dtype: Dtype = None,
    lora: Lora = None,
    optimizer: Optimizer = "adamw",
    host_budget: Host = None,
    sizes: Sizes = None,
    as_json: AsJson = False,
) -> None:
    """The largest batch, or the longest sequence, that fits."""
    with _stages() as stage:
        question = _question(stage, Request(model, batch, seq, dtype, lora, optimizer, sizes or ()), device, host_budget)
        stage(f"looking for the largest {dim}")
        found = remat.fit(**question, budget=_budget(budget), dim=dim, multiple_of=multiple_of)
    if as_json:
        own = {name: getattr(found, name) for name in ("dim", "size", "budget_bytes", "next_size", "next_bytes", "limit")}
        print(json.dumps({**own, "plan": show.figures(found.plan)}))
    else:
        print(found)


@app.command()
def devices(as_json: AsJson = False) -> None:
    """The devices that plans can be made for."""
    if as_json:
        print(json.dumps([{**dataclasses.asdict(p), "link": p.link._asdict()} for p in DEVICES.values()]))
    else:
        show.devices(_out, DEVICES.values())


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="a plan file")],
    value: Annotated[str, typer.Argument(help="the name of a value, as `remat plan --values` shows it")],
    as_json: AsJson = False,
) -> None:
    """Why a value is saved, recomputed or offloaded, and what the other ways would cost."""
    found = explain_value(_read(plan), value)
    print(json.dumps(dataclasses.asdict(found), default=_plain) if as_json else found)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="a plan file")],
    b: Annotated[Path, typer.Argument(help="another")],
    as_json: AsJson = False,
) -> int:
    """In what two plans differ; exit code 1 if they do."""
    found = compare(_read(a), _read(b))
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        show.difference(_out, found)
    return 1 if found else 0


def _question(stage: Callable[[str], None], request: Request, device: str | None, host_budget: str | None) -> dict[str, Any]:
    """The arguments that all questions share; the model is built."""
    stage("building the model")
    built = build(request)
    stage("tracing and planning")
    return {
        "model": built.model,
        "args": built.args,
        "kwargs": built.kwargs,
        "optimizer": built.optimizer,
        "device": device or _device_here(),
        "host_budget": int(host_budget) if host_budget and host_budget.isdigit() else host_budget,
    }


def _budget(text: str) -> int | float | str | None:
    if text == "none":
        return None
    if text.isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _device_here() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    name = profile_of(torch.device("cuda")).name
    if name not in DEVICES:
        raise RematError(f"{torch.cuda.get_device_name()} is none of the devices that `remat devices` lists; say --device")
    return name


def _read(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (RematError, UnicodeDecodeError) as error:
        raise RematError(f"{path}: {error}") from error


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else str(value)


@contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done, and for how long."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(pulse_style="cyan"), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def stage(text: str) -> None:
            progress.update(task, description=text)

        yield stage
