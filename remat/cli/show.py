"""What the commands print and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from remat.alternatives import Difference
from remat.budget import format_bytes
from remat.devices import DeviceProfile
from remat.errors import RematError
from remat.plan import Plan

_WRITERS = {".json": "a plan", ".html": "a page", ".trace": "a Chrome trace", ".pickle": "a memory snapshot"}
_FIGURES = (
    "budget_bytes",
    "peak_bytes",
    "baseline_peak_bytes",
    "saved_bytes",
    "host_bytes",
    "step_us",
    "recompute_us",
    "stall_us",
)
_SHOWN = 20  # values that two plans treat differently


def figures(plan: Plan) -> dict[str, Any]:
    """A plan's headline as data."""
    return {**{name: getattr(plan, name) for name in _FIGURES}, "at_peak": plan.at_peak()}


def plan(console: Console, found: Plan) -> None:
    """The answer, memory by kind, and the time of a step."""
    within = "" if found.budget_bytes is None else f" in {format_bytes(found.budget_bytes)}"
    inputs = ", ".join(f"{i.name} {'×'.join(map(str, i.shape))}" for i in found.inputs)
    before = format_bytes(found.baseline_peak_bytes)
    _say(console, f"{found.model} ({inputs}) on {found.device}")
    _say(console, f"fits{within}: {format_bytes(found.peak_bytes)} at its peak ({before} with everything saved)")
    table = Table("at the peak", "size")
    table.columns[1].justify = "right"
    for kind, size in found.at_peak().items():
        table.add_row(kind, format_bytes(size))
    console.print(table)
    step = found.baseline_step_us or 1.0
    host = f", {found.stall_us / step:.1%} for copies; {format_bytes(found.host_bytes)} on the host" if found.host_bytes else ""
    again = f"{found.recompute_us / step:.1%} more for recompute"
    _say(console, f"step {found.step_us / 1e3:.1f} ms, predicted: {again}{host}")
    top = max(found.timeline, key=lambda moment: moment.live_bytes)
    _say(console, f"the peak is at {top}; planned in {found.planning_seconds:.1f} s after tracing")


def frontier(console: Console, plans: Sequence[Plan]) -> None:
    """One row for each plan."""
    table = Table("peak", "step", "more", "saved", "on the host", "largest at the peak")
    for found in plans:
        kind, size = next(iter(found.at_peak().items()))
        table.add_row(
            format_bytes(found.peak_bytes),
            f"{found.step_us / 1e3:.1f} ms",
            f"{found.step_us / (found.baseline_step_us or 1) - 1:.1%}",
            format_bytes(found.saved_bytes),
            format_bytes(found.host_bytes) if found.host_bytes else "",
            f"{kind} {format_bytes(size)}",
        )
    console.print(table)


def devices(console: Console, profiles: Iterable[DeviceProfile]) -> None:
    """One row for each device."""
    table = Table("name", "memory", "half TFLOP/s", "float TFLOP/s", "GB/s", "link GB/s")
    for profile in profiles:
        table.add_row(
            profile.name,
            format_bytes(profile.memory_bytes) if profile.memory_bytes else "the host's",
            f"{profile.half_flop_per_us / 1e6:.1f}",
            f"{profile.float_flop_per_us / 1e6:.1f}",
            f"{profile.bytes_per_us / 1e3:.0f}",
            f"{profile.link.out_bytes_per_us / 1e3:.0f}",
        )
    console.print(table)
    _say(console, "Rates are those that plans count with: what kernels reach, below the data sheets.")


def difference(console: Console, found: Difference) -> None:
    """Figures side by side, then values."""
    table = Table("", "a", "b")
    for name, pair in found.figures.items():
        table.add_row(name, *(_figure(name, value) for value in pair))
    console.print(table)
    console.print(
        f"{len(found.decisions)} values are treated differently" if found.decisions else "all values are treated alike"
    )
    for name, (ours, theirs) in list(found.decisions.items())[:_SHOWN]:
        _say(console, f"  {name}: {ours} → {theirs}")
    if len(found.decisions) > _SHOWN:
        console.print(f"  and {len(found.decisions) - _SHOWN} more; --json has all")


def _say(console: Console, text: str) -> None:
    """A line of its own, however long."""
    console.print(text, markup=False, soft_wrap=True)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    return format_bytes(int(value)) if name.endswith("_bytes") else f"{value / 1e3:.2f} ms"


def check_suffix(path: Path) -> None:
    """Raises RematError for a file that `write` does not know how to write."""
    if path.suffix not in _WRITERS:
        raise RematError(
            f"-o {path}: the suffix says what to write: {', '.join(f'{s} {what}' for s, what in _WRITERS.items())}"
        )
    if not path.parent.is_dir():
        raise RematError(f"-o {path}: there is no folder {path.parent}")


def write(found: Plan, path: Path, around: Sequence[Plan]) -> None:
    """Write a plan in the form that the suffix names. `around`: its frontier, for the page."""
    if path.suffix == ".json":
        path.write_text(found.to_json(), encoding="utf-8")
    elif path.suffix == ".html":
        found.to_html(path, around)
    elif path.suffix == ".trace":
        found.to_trace(path)
    else:
        found.to_snapshot(path)


def check_picture(path: Path) -> None:
    """Raises RematError for a picture that `picture` does not know how to draw."""
    from remat.views import charts

    charts.check_suffix(path)


def picture(plans: Sequence[Plan], path: Path) -> None:
    """Step time against peak."""
    from remat.views import charts

    charts.save(charts.frontier(plans), path)
