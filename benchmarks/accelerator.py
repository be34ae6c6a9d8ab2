"""Step time against peak memory on an accelerator: remat through both doors against eager and compiled peers.

On a stack of Llama blocks in bfloat16 (stack.py). Every configuration is a process of its own. Peers are set up first, all at
once; then remat, with each peer's measured peak as its budget, and for per-block checkpointing 1.5 times its peak as well. Once
all are warm they take steps in turn. A time is the median over the rounds, between synchronizations of the device; a ratio is
the median of the ratios within a round. Peaks are the allocator's.

    python -m benchmarks.accelerator [--width 2048] [--depth 6] [--length 8192] [--rounds 9] [--kinds eager compiled]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import remat
from benchmarks.peers import prepare
from benchmarks.stack import need_accelerator, stack, step_of, write

PEERS = {
    "eager": ("eager", "checkpoint/1", "checkpoint/2", "selective/matmuls", "save_on_cpu"),
    "compiled": (
        "compile",
        "compile+checkpoint/1",
        "compile+checkpoint/2",
        "ratio/0.5/dp",
        "ratio/0.2/dp",
        "regional/0.3/dp",
        "regional/0.0/dp",
    ),
}
PLAIN = ("eager", "compile")
THREADS = "3"  # that each Inductor compiles with: there are many at once


def work(name: str, width: int, depth: int, length: int) -> None:
    """The life of a worker: for the first line, a budget, it sets up and says what that took; for each other, a step."""
    out, sys.stdout = sys.stdout, sys.stderr
    device = need_accelerator()
    model, x = stack(width, depth, length)
    budget = int(sys.stdin.readline())
    start = time.perf_counter()
    try:
        call, loss = prepare(f"{name}/{budget}" if name.startswith("remat") else name, (model, {"x": x}, list(model.layers)))
        step = step_of(lambda _: loss(), x, model)
        step()
        setup_s = time.perf_counter() - start
        step()
        measured = remat.measure(step)
        plan = None
        if name.startswith("remat"):
            plan = remat.plans(call)[-1].plan if name.startswith("remat-compiled") else call.plan
        told = (
            {"planned_bytes": plan.peak_bytes, "planned_ms": plan.step_us / 1e3, "host_bytes": plan.host_bytes} if plan else {}
        )
        answer = {"peak_bytes": measured.peak_bytes, "resident_bytes": measured.resident_bytes, "setup_s": setup_s, **told}
    except Exception as error:  # whatever a peer dies of goes into the table
        answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    print(json.dumps(answer), file=out, flush=True)
    for _ in sys.stdin:
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        step()
        torch.accelerator.synchronize(device)
        print((time.perf_counter() - start) * 1e3, file=out, flush=True)


class Worker:
    """A process with one configuration; `found` is what it says of itself once it is set up."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name, self.times = name, list[float]()
        self.found: dict[str, Any] = {}
        command = [sys.executable, "-m", "benchmarks.accelerator", "--worker", name, *map(str, shape)]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": THREADS}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)

    def tell(self, line: object = "") -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def ready(self) -> bool:
        self.found = json.loads(self._line() or '{"error": "the process died"}')
        took = self.found.get("error") or f"{self.found['peak_bytes'] / 2**20:.0f} MiB, set up in {self.found['setup_s']:.0f} s"
        print(f"{self.name}: {took}", flush=True)
        return "error" not in self.found

    def step(self) -> None:
        self.tell()
        self.times.append(float(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def race(kind: str, shape: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """All peers of a kind, and remat at the peaks of those that save memory."""
    door = "remat-compiled" if kind == "compiled" else "remat"
    pairs = [(name, factor, door) for name in PEERS[kind] if name not in PLAIN for factor in _factors(name)]
    pairs += [(name, 1.0, f"{door}+host") for name in PEERS[kind] if name.endswith("checkpoint/1")]
    peers = {name: Worker(name, shape) for name in PEERS[kind]}
    ours = [(peer, factor, Worker(name, shape)) for peer, factor, name in pairs]
    try:
        for worker in peers.values():
            worker.tell(0)
        running = {name: worker for name, worker in peers.items() if worker.ready()}
        met = [(running[peer], factor, worker) for peer, factor, worker in ours if peer in running]
        for peer, factor, worker in met:
            above = peer.found["peak_bytes"] - peer.found["resident_bytes"]
            worker.tell(int(peer.found["resident_bytes"] + factor * above))
        met = [duel for duel in met if duel[2].ready()]
        steps = [*running.values(), *(worker for *_, worker in met)]
        for turn in range(rounds + 2):
            for worker in steps:
                worker.step()
                if turn < 2:
                    worker.times.clear()
        plain = next((running[name] for name in PLAIN if name in running), None)
        rows = [_row(worker, worker, 1.0, plain) for worker in running.values()]
        return rows + [_row(worker, peer, factor, plain) for peer, factor, worker in met]
    finally:
        for worker in (*peers.values(), *(worker for *_, worker in ours)):
            worker.close()


def _factors(name: str) -> tuple[float, ...]:
    return (1.0, 1.5) if name.endswith("checkpoint/1") else (1.0,)


def _row(worker: Worker, peer: Worker, factor: float, plain: Worker | None) -> dict[str, Any]:
    found, room = worker.found, factor * (peer.found["peak_bytes"] - peer.found["resident_bytes"])
    return {
        "name": worker.name,
        "against": "" if worker is peer else peer.name + (f" x {factor}" if factor != 1 else ""),
        "room MiB": round(room / 2**20),
        "peak MiB": round((found["peak_bytes"] - found["resident_bytes"]) / 2**20),
        "planned MiB": round((found["planned_bytes"] - found["resident_bytes"]) / 2**20) if "planned_bytes" in found else "",
        "host MiB": round(found.get("host_bytes", 0) / 2**20),
        "ms": statistics.median(worker.times),
        "planned ms": found.get("planned_ms", ""),
        "of plain": _ratio(worker, plain) if plain is not None else "",
        "of peer": _ratio(worker, peer),
        "setup s": round(found["setup_s"], 1),
    }


def _ratio(worker: Worker, other: Worker) -> float:
    return statistics.median(a / b for a, b in zip(worker.times, other.times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kinds", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], *map(int, options.worker[1:]))
        return
    need_accelerator()
    remat.profile_device()
    shape = options.width, options.depth, options.length
    for kind in options.kinds:
        if rows := race(kind, shape, options.rounds):  # else each has printed its error
            write(f"accelerator-{kind}", rows)


if __name__ == "__main__":
    main()
