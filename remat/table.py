"""Plans as text: a headline in the user's units, then one table in which equal blocks are merged."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence

from remat.budget import format_bytes
from remat.errors import RematError
from remat.plan import Activation, Block, Plan

log = logging.getLogger("remat")

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def summary(plan: Plan) -> str:
    """The table behind `print(plan.summary())`."""
    lines = [*_headline(plan), ""]
    rows: list[tuple[str, ...]] = [("value", "shape", "dtype", "bytes", "decision", "reason", "source", "module")]
    for blocks in _merge(plan.blocks):
        rows.append((_title(blocks), *[""] * 7))
        rows.extend(_row(activation) for activation in blocks[0].activations)
    return "\n".join([*lines, *aligned(rows)])


def announce(plan: Plan) -> None:
    """Log a plan that was made: the headline as info, the table for debugging (TORCH_LOGS="remat", or "+remat")."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", summary(plan))
    elif log.isEnabledFor(logging.INFO):
        log.info("%s", "\n".join(_headline(plan)))


def notebook(plan: Plan) -> str:
    """What a notebook shows of a plan."""
    try:
        from remat.views import charts
    except RematError:
        return f"<pre>{html.escape(summary(plan))}</pre>"
    lines = "<br>".join(html.escape(line) for line in _headline(plan))
    return f"<p>{lines}</p>{charts.svg(charts.timeline(plan))}"


def _headline(plan: Plan) -> list[str]:
    budget = "none" if plan.budget_bytes is None else format_bytes(plan.budget_bytes)
    step_us = plan.baseline_step_us or 1.0
    host = f", on the host {format_bytes(plan.host_bytes)}" if plan.host_bytes else ""
    stall = f", waiting for copies {plan.stall_us / step_us:.1%}" if plan.host_bytes else ""
    at = max(plan.timeline, key=lambda moment: moment.live_bytes, default=None)
    where = f", at {at}" if at is not None else ""
    return [
        f"budget {budget}: peak {format_bytes(plan.baseline_peak_bytes)} → {format_bytes(plan.peak_bytes)}{where}",
        "at the peak: " + ", ".join(f"{kind} {format_bytes(size)}" for kind, size in plan.at_peak().items()),
        f"resident {format_bytes(plan.resident_bytes)}, saved for backward {format_bytes(plan.saved_bytes)}{host}; "
        f"recompute adds {plan.recompute_us / step_us:.1%} to the step{stall} (planned in {plan.planning_seconds:.2f} s)",
    ]


def _merge(blocks: Sequence[Block]) -> list[list[Block]]:
    """Equal blocks together, in order of first appearance; blocks with nothing for backward are left out."""
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        if block.activations:
            groups.setdefault(f"{block.shape} {_INDEX.sub('.*', block.module)}", []).append(block)
    return list(groups.values())


def _title(blocks: list[Block]) -> str:
    first = blocks[0]
    regions = " checkpoint region," if first.region else " inline,"
    cost = f" saved {format_bytes(first.saved_bytes)}" + (f", recompute {first.recompute_us:.0f} us" if first.region else "")
    return f"── {_module_range(blocks)}:{regions}{cost}"


def _module_range(blocks: list[Block]) -> str:
    """`model.layers.0-11 (x12)` for the merged blocks."""
    name = blocks[0].module or blocks[0].name
    if len(blocks) == 1:
        return name
    numbers = [_INDEX.findall(block.module) for block in blocks]
    if all(found for found in numbers):
        indices = sorted({int(found[0]) for found in numbers})
        name = _INDEX.sub(f".{_ranges(indices)}", blocks[0].module, count=1)
    return f"{name} (x{len(blocks)})"


def _ranges(indices: list[int]) -> str:
    parts: list[list[int]] = []
    for i in indices:
        if parts and i == parts[-1][-1] + 1:
            parts[-1].append(i)
        else:
            parts.append([i])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _row(activation: Activation) -> tuple[str, ...]:
    return (
        f"  {activation.name}",
        "x".join(map(str, activation.shape)),
        activation.dtype,
        format_bytes(activation.bytes),
        activation.decision.value,
        activation.reason,
        activation.source,
        activation.module,
    )


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with columns of equal width; a row with a first cell only is a title."""
    table = [row for row in rows if any(row[1:])]
    widths = [max(len(row[i]) for row in table) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() if any(row[1:]) else row[0]
        for row in rows
    ]
