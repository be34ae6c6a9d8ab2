"""Step time against peak memory: remat at the peak of every peer, and at peaks that none of them reaches.

Each configuration is a process of its own, on one thread. Peers are set up first, and those that another beats by far in both
peak and time are let go. Then remat is given, as its budget in bytes, the peak of each peer that is left (door 1 for eager
peers, door 2 for compiled ones), 1.5 times the peak of per-block checkpointing, and the least it can do. Then all take steps
in turn, so that a busy machine slows all of them; a time is the median of process CPU seconds over the rounds, a ratio the
median of the ratios within a round. Peaks are the allocator's, of a warm step that starts without gradients, never a plan's.

    python benchmarks/frontier.py [MODEL ...] [--rounds 7] [--peers WORD ...] [--solvers dp ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import MODELS, SOLVERS, build, compiled_peers, eager_peers, prepare
from rich.progress import Progress

import remat
from remat.module import RematModule

RESULTS = Path(__file__).parent / "results" / "frontier"
AT_ONCE = 2  # processes that are set up at a time
TRIALS = 3  # steps by which peers are sorted out before the rounds
FAR = 1.04  # a peer is let go if another is this much better in time, and no worse in peak


@dataclass
class Point:
    """One configuration of one model. Bytes include parameters and gradients; seconds are CPU time of one forward and backward,
    `times` in the rounds; `setup_s` is wall time to the end of the first step."""

    name: str
    peak_bytes: int
    resident_bytes: int
    trial_s: float
    setup_s: float
    budget_bytes: int | None = None
    predicted_us: float | None = None
    times: list[float] = field(default_factory=list)


class Worker:
    """A process with one configuration, set up and warm. `point` is None where that failed, and `error` says why."""

    def __init__(self, model: str, name: str) -> None:
        self.name = name
        command = [sys.executable, __file__, "--worker", model, name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        found = json.loads(self._line() or '{"error": "the process died"}')
        self.error = str(found.get("error", ""))
        self.point = None if self.error else Point(**found)

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
            points, failures = race(model, options, progress)
        data = {"torch": torch.__version__, "model": model, "rounds": options.rounds, "failures": failures}
        text = json.dumps({**data, "points": [asdict(point) for point in points]}, indent=1)
        (RESULTS / f"{model}.json").write_text(text + "\n")


def race(model: str, options: argparse.Namespace, progress: Progress) -> tuple[list[Point], dict[str, str]]:
    """The points of a model, and of each configuration that failed why."""
    everyone = [*eager_peers("cpu"), *compiled_peers(options.solvers)]
    peers = [name for name in everyone if not options.peers or any(word in name for word in options.peers)]
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def set_up(names: Sequence[str], keep: Callable[[Sequence[Point]], set[str]]) -> list[Worker]:
            """Workers for `names`; after each, those whose points `keep` does not name are closed."""
            task = progress.add_task(f"{model}: setting up", total=len(names))
            kept: list[Worker] = []
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for worker in pool.map(lambda name: Worker(model, name), names):
                    stack.callback(worker.close)
                    progress.advance(task)
                    if worker.point is None:
                        failures[worker.name] = worker.error
                        continue
                    kept.append(worker)
                    names_left = keep([w.point for w in kept if w.point is not None])
                    for lost in [w for w in kept if w.name not in names_left]:
                        kept.remove(lost)
                        lost.close()
                        failures[lost.name] = _why_left_out(lost)
            return kept

        workers = set_up(peers, _not_far_behind)
        workers += set_up(_ours([w.point for w in workers if w.point is not None]), lambda points: {p.name for p in points})
        points = [worker.point for worker in workers if worker.point is not None]
        task = progress.add_task(f"{model}: rounds", total=options.rounds * len(workers))
        for _ in range(options.rounds):
            for worker, point in zip(workers, points, strict=True):
                point.times.append(worker.step())
                progress.advance(task)
    return points, failures


def _why_left_out(worker: Worker) -> str:
    assert worker.point is not None
    return f"behind others at once: {worker.point.peak_bytes} bytes, {worker.point.trial_s:.3f} s"


def is_compiled(name: str) -> bool:
    """True for configurations that Inductor compiles."""
    return name.startswith(("compile", "ratio", "regional", "remat-compiled"))


def _not_far_behind(points: Sequence[Point]) -> set[str]:
    """All but ratio budgets of which another peer makes little sense of."""
    return {
        p.name
        for p in points
        if not p.name.startswith(("ratio", "regional"))
        or not any(q.peak_bytes <= p.peak_bytes and q.trial_s * FAR <= p.trial_s for q in points if is_compiled(q.name))
    }


def _ours(peers: Sequence[Point]) -> list[str]:
    """The configurations of remat that answer these peers."""
    budgets: dict[str, None] = {}
    for peer in peers:
        door = "remat-compiled" if is_compiled(peer.name) else "remat"
        if peer.name != "compile" and peer.name != "eager":
            budgets[f"{door}/{peer.peak_bytes}"] = None
        if peer.name.endswith("checkpoint/1"):
            budgets[f"{door}/{peer.peak_bytes * 3 // 2}"] = None
    doors = dict.fromkeys(name.split("/")[0] for name in budgets)
    return [*budgets, *(f"{door}/smallest" for door in doors)]


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
    try:
        found = [compiled.plan for compiled in remat.plans(call)]
    except remat.RematError:
        found = [call.plan] if isinstance(call, RematModule) else []
    if not found:
        return {}
    return {"budget_bytes": found[-1].budget_bytes, "predicted_us": sum(plan.step_us for plan in found)}


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
