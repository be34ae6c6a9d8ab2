"""Predicted against measured on an accelerator: peak and time of a step, on stacks of Llama blocks of several widths.

Times of ops are measured ones. The bar: peaks within 3%, times within 15%.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

import remat
from benchmarks.stack import need_accelerator, stack, step_of, timed, write

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("everything saved", {"budget": None}),
    ("budget 0.6", {"budget": 0.6}),
    ("budget 0.3", {"budget": 0.3}),
    ("budget 0.3, no host", {"budget": 0.3, "host_budget": 0}),
    ("blocks", {"budget": None, "policy": "blocks"}),
    ("offload", {"budget": None, "policy": "offload"}),
    ("offload-all", {"budget": None, "policy": "offload-all"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 3072, 4096])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    arguments = parser.parse_args()
    need_accelerator()
    print(remat.profile_device())
    rows = []
    for width in arguments.widths:
        model, x = stack(width, arguments.depth, arguments.length)
        for name, settings in SETTINGS:
            try:
                module = remat.optimize(model, (x,), costs="measured", **settings)
            except remat.BudgetError as error:
                print(f"width {width}, {name}: {error}")
                continue
            plan = module.plan
            assert plan is not None
            ((milliseconds, peak),) = timed({name: step_of(module, x, model)}).values()
            predicted = plan.peak_bytes - plan.resident_bytes
            measured_all = peak + plan.resident_bytes
            rows.append(
                {
                    "width": width,
                    "plan": name,
                    "predicted MiB": round(predicted / 2**20),
                    "measured MiB": round(peak / 2**20),
                    "peak ratio": plan.peak_bytes / measured_all,
                    "predicted ms": plan.step_us / 1e3,
                    "measured ms": milliseconds,
                    "time ratio": plan.step_us / 1e3 / milliseconds,
                    "host MiB": round(plan.host_bytes / 2**20),
                    "within": "yes" if _within(plan.peak_bytes / measured_all, plan.step_us / 1e3 / milliseconds) else "no",
                }
            )
            del module, plan
            gc.collect()
        del model, x
        gc.collect()
        torch.accelerator.empty_cache()
        write("prediction", rows)


def _within(peak: float, time: float) -> bool:
    return abs(peak - 1) <= 0.03 and abs(time - 1) <= 0.15


if __name__ == "__main__":
    main()
