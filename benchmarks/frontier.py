"""Step time against peak memory: remat against every peer at that peer's peak, and at peaks that none of them reaches.

Each configuration is a process of its own, on one thread. Peers are tried first, and ratio budgets that another compiled peer
beats in both peak and time are left out. Then each peer that is left meets remat with the peer's measured peak as the budget in
bytes (door 1 against eager peers, door 2 against compiled ones), per-block checkpointing also at 1.5 times its peak. The two
processes take steps in turn, so that a busy machine slows both; a time is the median of process CPU seconds over the rounds, a
ratio the median of the ratios within a round. Peaks are the allocator's, of a warm step that starts without gradients, never a
plan's. glibc's allocator keeps what a step frees, for all of them: by default it returns some of it to the kernel now and then,
which depends on the order of a few large tensors, and costs a tenth of such a step and more.

    python benchmarks/frontier.py [MODEL ...] [--rounds 7] [--peers WORD ...] [--solvers dp ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import MODELS, build
from peers import SOLVERS, compiled_peers, eager_peers, prepare
from rich.progress import Progress

import remat
from remat.module import RematModule

RESULTS = Path(__file__).parent / "results" / "frontier"
AT_ONCE = 2  # peers that are tried at a time
TRIALS = 3  # steps to sort out peers by
FAR = 1.03  # by how much another's time is better where a ratio budget is left out
NEAR = 1.03  # peaks this close are one point of a ratio budget's curve: the fastest of them is raced
# The host's allocator keeps pages between steps, as accelerators' do: else the kernel takes some back, and clears them again.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


@dataclass
class Point:
    """One configuration of one model. Bytes include parameters and gradients; seconds are CPU time of one forward and backward,
    `times` in the rounds; `setup_s` is wall time to the end of the first step. `peaks`: remat's `CompiledPlan.peaks`."""

    name: str
    peak_bytes: int
    resident_bytes: int
    trial_s: float
    setup_s: float
    budget_bytes: int | None = None
    predicted_us: float | None = None
    peaks: list[list[int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass
class Duel:
    """A peer, and remat with the peer's peak (or 1.5 times it) as its budget, over the same rounds."""

    peer: Point
    ours: Point


@dataclass
class Race:
    """One model: plain steps, duels, remat's smallest steps, and why other configurations are not among them."""

    plain: list[Point]
    duels: list[Duel]
    smallest: list[Point]
    left_out: dict[str, str]


class Worker:
    """A process with one configuration. Once `ready`, it is set up and warm; `point` is None where that failed, and `error`
    says why."""

    def __init__(self, model: str, name: str) -> None:
        self.name = name
        command = [sys.executable, __file__, "--worker", model, name]
        pipe = subprocess.PIPE
        environment = {**os.environ, **ALLOCATOR}
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=environment)
        self.error = ""
        self.point: Point | None = None

    def ready(self) -> Worker:
        found = json.loads(self._line() or '{"error": "the process died"}')
        self.error = str(found.get("error", ""))
        self.point = None if self.error else Point(**found)
        return self

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def step(self) -> float:
        """CPU seconds of one more step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=[], help="only peers whose name contains one of these words")
    parser.add_argument("--solvers", nargs="*", default=SOLVERS, help="of the ratio budget")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for model in options.models or MODELS:
        with Progress() as progress:
            for found in race(model, options, progress):
                data = {"torch": torch.__version__, "model": model, "rounds": options.rounds, **asdict(found)}
                (RESULTS / f"{model}.json").write_text(json.dumps(data, indent=1) + "\n")


def race(model: str, options: argparse.Namespace, progress: Progress) -> Iterator[Race]:
    """All of a model's duels, and the smallest step of either door: after each what there is so far, since it takes hours."""
    everyone = [*eager_peers("cpu"), *compiled_peers(options.solvers)]
    names = [name for name in everyone if not options.peers or any(word in name for word in options.peers)]
    left_out: dict[str, str] = {}
    peers = [point for point in _tried(model, names, progress, left_out) if point is not None]
    compiled = [point for point in peers if is_compiled(point.name)]
    for point in peers:
        if not point.name.startswith(("ratio", "regional")):
            continue
        better = [q.name for q in compiled if q.peak_bytes <= point.peak_bytes and q.trial_s * FAR <= point.trial_s]
        if better:
            left_out[point.name] = f"{point.peak_bytes} bytes, {point.trial_s:.3f} s; {better[0]} has less of both"
            continue
        kind = point.name.split("/")[0]
        same = [q for q in compiled if q.name.startswith(kind) and q.name not in left_out]
        if point is min(same, key=lambda q: q.peak_bytes):
            continue
        same.remove(point)
        twins = [q for q in same if 1 / NEAR <= q.peak_bytes / point.peak_bytes <= NEAR and q.trial_s <= point.trial_s]
        if twins:
            left_out[point.name] = f"{point.peak_bytes} bytes, {point.trial_s:.3f} s; {twins[0].name} is as large and no slower"
    pairs = [
        (point.name, f"{'remat-compiled' if is_compiled(point.name) else 'remat'}/{int(factor * point.peak_bytes)}")
        for point in peers
        if point.name not in ("eager", "compile", *left_out)
        for factor in ((1.0, 1.5) if point.name.endswith("checkpoint/1") else (1.0,))
    ]
    found = Race([point for point in peers if point.name in ("eager", "compile")], [], [], left_out)
    for peer, ours in progress.track(pairs, description=f"{model}: in turn"):
        duel = _duel(model, peer, ours, options.rounds)
        if isinstance(duel, str):
            left_out[f"{ours} against {peer}"] = duel
        else:
            found.duels.append(duel)
        yield found
    doors = dict.fromkeys(ours.split("/")[0] for _, ours in pairs)
    smallest = _tried(model, [f"{door}/smallest" for door in doors], progress, left_out)
    found.smallest.extend(point for point in smallest if point is not None)
    yield found


def _tried(model: str, names: Sequence[str], progress: Progress, failures: dict[str, str]) -> Iterator[Point | None]:
    """The points of configurations that nobody waits for; None, and the error in `failures`, for one that fails."""

    def one(name: str) -> Worker:
        worker = Worker(model, name).ready()
        worker.close()
        return worker

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for worker in progress.track(pool.map(one, names), total=len(names), description=f"{model}: setting up"):
            if worker.error:
                failures[worker.name] = worker.error
            yield worker.point


def _duel(model: str, peer: str, ours: str, rounds: int) -> Duel | str:
    """Two configurations in turn; an error as text."""
    with contextlib.ExitStack() as stack:
        workers = [Worker(model, peer), Worker(model, ours)]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.ready()
        for _ in range(rounds):
            for worker in workers:
                if worker.point is None:
                    return f"{worker.name}: {worker.error}"
                worker.point.times.append(worker.step())
        return Duel(*(worker.point for worker in workers if worker.point is not None))


def is_compiled(name: str) -> bool:
    """True for configurations that Inductor compiles."""
    return name.startswith(("compile", "ratio", "regional", "remat-compiled"))


def work(model: str, name: str) -> None:
    """The life of a worker: set up, say what it took, and take a step for each line that comes."""
    with contextlib.redirect_stdout(sys.stderr):
        torch.set_num_threads(1)
        torch._dynamo.config.recompile_limit = 64  # a block compiled alone is compiled for each of its kinds
        built = build(model)
        start = time.perf_counter()
        try:
            call, loss = prepare(name, built)
            loss().backward()
        except Exception as error:  # whatever a peer dies of goes into the table
            answer: dict[str, Any] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        else:
            setup_s = time.perf_counter() - start
            built[0].zero_grad()
            step = _Step(built[0], loss)
            step()
            measured = remat.measure(lambda: loss().backward())
            built[0].zero_grad()
            answer = {"peak_bytes": measured.peak_bytes, "resident_bytes": measured.resident_bytes, "setup_s": setup_s}
            answer |= {"name": name, "trial_s": min(step() for _ in range(TRIALS)), **_prediction(call)}
    print(json.dumps(answer), flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def _prediction(call: Any) -> dict[str, Any]:
    """What remat promised; nothing for a peer."""
    if isinstance(call, RematModule):
        return {"budget_bytes": call.plan.budget_bytes, "predicted_us": call.plan.step_us} if call.plan else {}
    try:
        found = remat.plans(call)
    except remat.RematError:
        return {}
    plans = [compiled.plan for compiled in found]
    peaks = [peaks for compiled in found for peaks in compiled.peaks]
    return {"budget_bytes": plans[-1].budget_bytes, "predicted_us": sum(plan.step_us for plan in plans), "peaks": peaks}


@dataclass(frozen=True)
class _Step:
    """CPU seconds of one forward and backward."""

    model: Any
    loss: Callable[[], torch.Tensor]

    def __call__(self) -> float:
        start = time.process_time()
        self.loss().backward()
        seconds = time.process_time() - start
        self.model.zero_grad()
        return seconds


if __name__ == "__main__":
    main()
