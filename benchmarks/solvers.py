"""What the solvers of torch's ratio budget save: "greedy" and "ilp" beside "dp", which is raced in `frontier.py`.

Each model is traced and partitioned as for Inductor, and nothing is compiled: what forward leaves for backward, and how much
arithmetic is in backward then, say what a solver chose.

    python benchmarks/solvers.py [MODEL ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import MODELS
from peers import RATIOS, SOLVERS, Built
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.utils.flop_counter import flop_registry

RESULTS = Path(__file__).parent / "results" / "solvers.json"


class Step(NamedTuple):
    """The graphs of a step: MiB of what forward returns, for backward or for the model, and the arithmetic in backward."""

    saved_mib: float
    backward_gflop: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.models or MODELS:
        for how, ratio in itertools.product(("ratio", "regional"), RATIOS):
            steps = {solver: step(MODELS[model], how, ratio, solver)._asdict() for solver in SOLVERS}
            print(f"{model}, {how} {ratio}: {steps}", flush=True)
            found[f"{model}/{how}/{ratio}"] = steps
        RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def step(build: Callable[[], Built], how: str, ratio: float, solver: str) -> Step:
    """One forward and backward of a model under a ratio budget, for the whole of it or for each block."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch, blocks = build()
    saved = flops = 0

    def keep(gm: fx.GraphModule, _: Sequence[Any], **settings: Any) -> Any:
        nonlocal saved, flops
        if settings.get("is_backward"):
            flops += sum(map(_flops, gm.graph.nodes))
        else:
            values = [node.meta["val"] for node in gm.graph.output_node().all_input_nodes]
            saved += sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(gm, inputs, inner_compile=keep)

    with functorch_config.patch(activation_memory_budget=ratio, activation_memory_budget_solver=solver):
        call: Any = torch.compile(model, backend=backend) if how == "ratio" else model
        if how == "regional":
            for block in blocks:
                block.compile(backend=backend)
        loss = call(**batch)
        loss = loss if isinstance(loss, torch.Tensor) else loss[0].square().mean()
        loss.backward()
    return Step(round(saved / 2**20, 2), round(flops / 1e9, 3))


def _flops(node: fx.Node) -> int:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return int(count(*args, **kwargs, out_val=node.meta["val"]))


if __name__ == "__main__":
    main()
