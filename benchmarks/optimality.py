"""How far remat's plans are from the best there is, on graphs small enough to prove it.

The exact model is that of MOCCASIN (Bartan et al. 2023): retention intervals, solved by CP-SAT (ortools). Each forward value
may be computed again at any moment of backward, up to `COMPUTATIONS` times in all, kept as long as one likes, and dropped
again; every op and every read must lie in such an interval; the intervals, gradients and scratch memory together must fit at
every moment. It knows nothing of blocks, regions or just-in-time order. Both sides have the same costs and the same bytes.

The gap is extra time: recompute time of remat's plan over that of the optimum, minus one; and the same as a share of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from ortools.sat.python import cp_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from remat.menus import make_menus
from remat.planner import fastest_solution, smallest_solution, solve
from remat.program import Program
from remat.whole import trace

RESULTS = Path(__file__).parent / "results" / "optimality.json"
COMPUTATIONS = 3
LIMIT_S = 120.0
SHARES = (0.9, 0.7, 0.5, 0.3, 0.15, 0.0)  # of the way from the smallest plan's peak to that of saving everything
CLASSES = {"num_labels": 5, "problem_type": "single_label_classification"}
_SCALE = 1000  # CP-SAT wants integers: nanoseconds


@dataclass(frozen=True)
class Pair:
    """A graph at a budget. Times in microseconds; `optimum_us` is None where none was proven within the limit."""

    graph: str
    ops: int
    budget_bytes: int
    share: float
    step_us: float
    ours_us: float
    optimum_us: float | None
    bound_us: float
    exact_s: float
    planning_s: float

    @property
    def gap(self) -> float:
        """Extra time beyond the optimum's, as a share of it."""
        assert self.optimum_us is not None
        return (self.ours_us - self.optimum_us) / self.optimum_us if self.optimum_us else float(self.ours_us > 0)

    @property
    def step_gap(self) -> float:
        """The same as a share of the step."""
        assert self.optimum_us is not None
        return (self.ours_us - self.optimum_us) / (self.step_us + self.optimum_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="*", help=f"of {', '.join(GRAPHS)}; all by default")
    names = parser.parse_args().graphs or list(GRAPHS)
    pairs = [pair for name in names for pair in compare(name)]
    show(pairs)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "pairs": [asdict(pair) for pair in pairs]}, indent=1) + "\n")


def compare(name: str) -> Iterator[Pair]:
    torch.manual_seed(0)
    model, args = GRAPHS[name]()
    program = condensed(
        trace(model.train(), args if isinstance(args, tuple) else (), args if isinstance(args, dict) else {}).program
    )
    menus = make_menus(program)
    top, bottom = (f(menus).replay.peak_bytes for f in (fastest_solution, smallest_solution))
    for share in track(SHARES, name):
        budget = int(bottom + share * (top - bottom))
        start = time.perf_counter()
        ours = solve(make_menus(program), budget)
        planning_s = time.perf_counter() - start
        start = time.perf_counter()
        optimum, bound = best(program, budget)
        ops = len(program.forward) + len(program.backward)
        exact_s = time.perf_counter() - start
        yield Pair(name, ops, budget, share, program.step_us, ours.replay.recompute_us, optimum, bound, exact_s, planning_s)


def condensed(program: Program) -> Program:
    """Without ops that neither write, read, nor take scratch memory (views), and with regions that hold nothing."""
    n = len(program.forward)
    kept = [p for p, op in enumerate(program.forward) if op.outputs or op.workspace_bytes]
    # A position that goes is taken over by the one before it.
    place = {}
    at = -1
    chosen = set(kept)
    for p in range(n):
        at += p in chosen
        place[p] = max(at, 0)
    for p in range(n, n + len(program.backward)):
        place[p] = p - n + len(kept)
    values = tuple(
        value._replace(
            op=place[value.op],
            last_forward=place[value.last_forward],
            reads=tuple(place[p] for p in value.reads),
            release=place[value.release] if value.release >= 0 else -1,
        )
        for value in program.values
    )
    fixed = tuple(f._replace(born=place[f.born], dies=place[f.dies]) for f in program.fixed)
    forward = tuple(program.forward[p] for p in kept)
    return dataclasses.replace(program, forward=forward, values=values, fixed=fixed, regions_hold=False, moments=())


def best(program: Program, budget_bytes: int) -> tuple[float | None, float]:
    """The least recompute time within the budget in microseconds, None where it is not proven, and the proven lower bound."""
    n, total = len(program.forward), len(program.forward) + len(program.backward)
    model = cp_model.CpModel()
    width = n + 1  # a backward position is n moments for recompute, in forward order, and one for its op

    def moment(p: int) -> int:
        return p if p < n else n + (p - n) * width + n

    horizon = moment(total - 1)
    intervals: list[Any] = []
    demands: list[int] = []

    def occupy(interval: Any, size: int) -> None:
        if size:
            intervals.append(interval)
            demands.append(size)

    def fixed(first: int, last: int, size: int) -> None:
        occupy(model.new_fixed_size_interval_var(first, last - first + 1, ""), size)

    for f in program.fixed:
        fixed(moment(f.born), moment(f.dies), f.bytes)
    for p, op in enumerate([*program.forward, *program.backward]):
        if op.workspace_bytes:
            fixed(moment(p), moment(p), op.workspace_bytes)
    stages = sorted({p for value in program.values for p in value.reads})
    runs: dict[int, list[tuple[Any, Any, Any]]] = {}  # of each op: (is there, when, at which stage)
    held: dict[int, list[tuple[Any, Any, Any]]] = {}  # of each value: (is there, from, to)
    cost = []
    for p, op in enumerate(program.forward):
        if not op.outputs:
            continue
        pinned = any(program.values[v].pinned for v in op.outputs)
        runs[p] = []
        for _ in range(0 if pinned or not stages else COMPUTATIONS - 1):
            there, stage = model.new_bool_var(""), model.new_int_var_from_domain(cp_model.Domain.from_values(stages), "")
            at = n + (stage - n) * width + p
            if runs[p]:
                model.add_implication(there, runs[p][-1][0])
                model.add(stage > runs[p][-1][2]).only_enforce_if(there)
            runs[p].append((there, at, stage))
            cost.append((there, int((op.cost_us + op.launch_us) * _SCALE)))
            occupy(model.new_optional_fixed_size_interval_var(at, 1, there, ""), op.workspace_bytes + op.state_bytes)
        for v in op.outputs:
            held[v] = [_first(model, program, v, moment, horizon)]
            for there, at, _ in runs[p]:
                end = model.new_int_var(n, horizon, "")
                model.add(end >= at).only_enforce_if(there)
                held[v].append((there, at, end))
            for there, start, end in held[v]:
                size = model.new_int_var(1, horizon + 1, "")
                occupy(model.new_optional_interval_var(start, size, end + 1, there, ""), program.values[v].bytes)
    for v, value in enumerate(program.values):
        for p in {*value.reads, *((value.release,) if value.release >= n else ())}:
            _covered(model, held[v], moment(p), None)
    for p, again in runs.items():
        for there, at, _ in again:
            for v in program.forward[p].inputs:
                _covered(model, held[v], at, there)
    model.add_cumulative(intervals, demands, budget_bytes - program.resident_bytes)
    model.minimize(sum(there * price for there, price in cost))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = LIMIT_S
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    bound = solver.best_objective_bound / _SCALE
    return (solver.objective_value / _SCALE if status == cp_model.OPTIMAL else None), bound


def _first(model: Any, program: Program, v: int, moment: Callable[[int], int], horizon: int) -> tuple[Any, Any, Any]:
    """A value's first interval: at least to its last use in forward, and to its end where it cannot be dropped."""
    value = program.values[v]
    last = moment(value.last_forward)
    if value.pinned and value.reads:
        last = max(last, moment(value.release))
    return True, moment(value.op), model.new_int_var(last, max(horizon, last), "")


def _covered(model: Any, intervals: list[tuple[Any, Any, Any]], at: Any, needed: Any) -> None:
    """Some interval holds the value at a moment, if `needed` (None: always)."""
    chosen = []
    for there, start, end in intervals:
        literal = model.new_bool_var("")
        if there is not True:
            model.add_implication(literal, there)
        model.add(start < at).only_enforce_if(literal)
        model.add(end >= at).only_enforce_if(literal)
        chosen.append(literal)
    if needed is None:
        model.add_bool_or(chosen)
    else:
        model.add_bool_or([*chosen, needed.negated()])


def show(pairs: list[Pair]) -> None:
    table = Table("graph", "ops", "budget", "step us", "ours us", "optimum us", "gap", "of the step", "exact s", "planning s")
    for pair in pairs:
        proven = pair.optimum_us is not None
        table.add_row(
            pair.graph,
            str(pair.ops),
            f"{pair.share:.0%}",
            f"{pair.step_us:.1f}",
            f"{pair.ours_us:.1f}",
            f"{pair.optimum_us:.1f}" if proven else f"≥ {pair.bound_us:.1f}",
            f"{pair.gap:.1%}" if proven else "",
            f"{pair.step_gap:.2%}" if proven else "",
            f"{pair.exact_s:.1f}",
            f"{pair.planning_s:.3f}",
        )
    Console(width=130).print(table)
    proven = [pair for pair in pairs if pair.optimum_us is not None]
    gaps, of_step = [pair.gap for pair in proven], [pair.step_gap for pair in proven]
    print(f"{len(proven)} of {len(pairs)} proven; extra time: mean {statistics.mean(gaps):.2%}, worst {max(gaps):.2%}")
    print(f"as a share of the step: mean {statistics.mean(of_step):.2%}, worst {max(of_step):.2%}")


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, w = x.shape
        q, k, v = (part.reshape(b, t, 4, w // 4).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, w))


class Convolutions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Mean(nn.Module):
    """Blocks and a loss."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).square().mean()


class Skips(nn.Module):
    """A small U-Net: long skip connections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for layer in self.down:
            kept.append(x)
            x = torch.nn.functional.gelu(layer(x))
        for layer in self.up:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0)
            x = torch.nn.functional.gelu(layer(torch.cat((x, kept.pop()), 1)))
        return x.square().mean()


def _sequence(width: int = 64) -> tuple[torch.Tensor]:
    return (torch.randn(8, 128, width),)


def _image(width: int = 16) -> tuple[torch.Tensor]:
    return (torch.randn(4, width, 32, 32),)


def _gpt2() -> Any:
    shape = {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**shape, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    ids = torch.randint(0, 96, (4, 64))
    return model, {"input_ids": ids, "labels": ids}


def _vit() -> Any:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**shape, image_size=32, patch_size=4, **CLASSES)
    ), _pictures()


def _convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, **CLASSES)
    return transformers.ConvNextForImageClassification(config), _pictures()


def _resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **CLASSES)
    return transformers.ResNetForImageClassification(config), _pictures()


def _pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(0, 5, (4,))}


def _llama() -> Any:
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = torch.randint(0, 96, (4, 128))
    config = transformers.LlamaConfig(**shape, use_cache=False)
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


GRAPHS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "2 MLP blocks": lambda: (Mean(*(Norm(64) for _ in range(2))), _sequence()),
    "4 MLP blocks": lambda: (Mean(*(Norm(64) for _ in range(4))), _sequence()),
    "6 MLP blocks": lambda: (Mean(*(Norm(64) for _ in range(6))), _sequence()),
    "1 gated block": lambda: (Mean(Gated(64)), _sequence()),
    "2 gated blocks": lambda: (Mean(*(Gated(64) for _ in range(2))), _sequence()),
    "1 attention block": lambda: (Mean(Attention(64)), _sequence()),
    "2 attention blocks": lambda: (Mean(*(Attention(64) for _ in range(2))), _sequence()),
    "1 transformer block": lambda: (Mean(Attention(64), Norm(64)), _sequence()),
    "2 transformer blocks": lambda: (Mean(Attention(64), Norm(64), Attention(64), Norm(64)), _sequence()),
    "1 Llama-like block": lambda: (Mean(Attention(64), Gated(64)), _sequence()),
    "2 residual blocks": lambda: (Mean(*(Convolutions(16) for _ in range(2))), _image()),
    "4 residual blocks": lambda: (Mean(*(Convolutions(16) for _ in range(4))), _image()),
    "U-Net": lambda: (Skips(16), _image()),
    "Llama, 1 layer": _llama,
    "GPT-2, 1 layer": _gpt2,
    "ViT, 2 layers": _vit,
    "ConvNeXt, 2 blocks": _convnext,
    "ResNet, 2 blocks": _resnet,
}


if __name__ == "__main__":
    main()
