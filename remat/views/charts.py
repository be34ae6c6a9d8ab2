"""Charts of plans, as Vega-Lite through Altair: the same ones in the page, in notebooks and in picture files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from remat.budget import format_bytes
from remat.errors import RematError
from remat.plan import Plan
from remat.program import KINDS, Decision
from remat.replay import Moment
from remat.verify import Verification

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise RematError("charts and pages need more packages: pip install 'remat[report]'") from error

COLUMNS = 1000  # of a timeline; of the moments that share one, the highest is drawn
FORMATS = ("svg", "png", "html")
_COLORS = dict(
    zip(
        KINDS,
        (
            "#64748b",
            "#94a3b8",
            "#cbd5e1",
            "#a16207",
            "#78716c",
            "#57534e",
            "#a8a29e",
            "#2563eb",
            "#ea580c",
            "#7c3aed",
            "#059669",
        ),
        strict=True,
    )
)
_DECISIONS = {Decision.SAVE: "#2563eb", Decision.RECOMPUTE: "#ea580c", Decision.OFFLOAD: "#059669"}
_VISIBLE = 0.001  # of the height of a timeline
_TIGHT = alt.Scale(nice=False)
_LANES = {"compute": "#2563eb", "recompute": "#ea580c", "copy out": "#059669", "copy in": "#7c3aed"}


class _Unit(NamedTuple):
    """What an axis of memory counts in."""

    name: str
    bytes: int

    @classmethod
    def of(cls, largest: int) -> _Unit:
        return next(
            (cls(name, 2**power) for name, power in (("GiB", 30), ("MiB", 20)) if largest >= 2 * 2**power), cls("KiB", 2**10)
        )

    def __call__(self, size: int) -> float:
        return round(size / self.bytes, 5)


def timeline(plan: Plan, before: bool = False) -> alt.LayerChart:
    """Memory over one step, stacked by kind: as planned, or with everything saved."""
    moments = plan.baseline_timeline if before else plan.timeline
    highest = max(plan.peak_bytes, plan.baseline_peak_bytes)
    kinds = [kind for k, kind in enumerate(KINDS) if max(moment.by_kind[k] for moment in moments) > _VISIBLE * highest]
    unit = _Unit.of(highest)
    top = unit(highest)
    x = alt.X("ms:Q", title="time of the step, ms", axis=alt.Axis(grid=False), scale=_TIGHT)
    base = alt.Chart(alt.Data(values=_columns(moments, kinds, unit)))
    area = (
        base.transform_fold([*kinds], as_=["kind", "size"])
        .mark_area(interpolate="step-after", line=False)
        .encode(
            x=x,
            y=alt.Y(
                "size:Q", stack="zero", scale=alt.Scale(domain=[0, 1.04 * top], nice=False), title=f"allocated, {unit.name}"
            ),
            color=alt.Color(
                "kind:N", title=None, sort=kinds, scale=alt.Scale(domain=kinds, range=[_COLORS[kind] for kind in kinds])
            ),
            order=alt.Order("rank:Q"),
        )
        .transform_calculate(rank=f"indexof({kinds}, datum.kind)")
    )
    layers: list[Any] = [area, *_marks(plan, moments, unit, top)]
    near = alt.selection_point(nearest=True, on="pointermove", fields=["ms"], empty=False, name="before" if before else "after")
    shown = [alt.Tooltip("op:N"), alt.Tooltip("phase:N"), alt.Tooltip("live:Q", title=f"all, {unit.name}", format=",.2f")]
    shown += [alt.Tooltip(f"{kind}:Q", title=f"{kind}, {unit.name}", format=",.2f") for kind in kinds]
    rule = base.mark_rule(color="gray").encode(x=x, tooltip=shown, opacity=alt.condition(near, alt.value(0.7), alt.value(0)))
    name = "with everything saved" if before else "as planned"
    label = f"Memory during a step, {name}: peak {format_bytes(max(moment.live_bytes for moment in moments))}"
    return alt.layer(*layers, rule.add_params(near)).properties(width="container", height=240, description=label)


def _columns(moments: Sequence[Moment], kinds: Sequence[str], unit: _Unit) -> list[dict[str, Any]]:
    """The rows of a timeline: the highest moment of each stretch of time."""
    end = moments[-1].end_us or 1.0
    groups = itertools.groupby(moments, key=lambda moment: int(moment.start_us / end * COLUMNS))
    tops = [max(group, key=lambda moment: moment.live_bytes) for _, group in groups]
    places = {kind: KINDS.index(kind) for kind in kinds}
    rows = [
        {
            "ms": round(m.start_us / 1e3, 4),
            "op": f"{m.name} of {m.module}" if m.module else m.name,
            "phase": m.phase,
            "live": unit(m.live_bytes),
            **{kind: unit(m.by_kind[place]) for kind, place in places.items()},
        }
        for m in tops
    ]
    return [*rows, {**rows[-1], "ms": round(end / 1e3, 4)}]


def _marks(plan: Plan, moments: Sequence[Moment], unit: _Unit, top: float) -> list[alt.Chart]:
    """Where backward starts, and the budget where it is not far above everything."""
    start = next((moment.start_us for moment in moments if moment.is_backward), moments[-1].end_us) / 1e3
    line = alt.Chart(alt.Data(values=[{"ms": start, "text": "backward →"}]))
    marks = [
        line.mark_rule(strokeDash=[4, 3], color="gray").encode(x="ms:Q"),
        line.mark_text(align="left", dx=4, dy=8, baseline="top", color="currentColor").encode(
            x="ms:Q", y=alt.value(0), text="text:N"
        ),
    ]
    if plan.budget_bytes is not None and unit(plan.budget_bytes) <= 1.04 * top:
        budget = alt.Chart(alt.Data(values=[{"size": unit(plan.budget_bytes), "text": "budget"}]))
        marks.append(budget.mark_rule(strokeDash=[8, 4], color="#dc2626", size=1.5).encode(y="size:Q"))
    return marks


def blocks(plan: Plan) -> alt.Chart:
    """What becomes of each block's activations, in bytes by decision."""
    unit = _Unit.of(max((sum(a.bytes for a in block.activations) for block in plan.blocks), default=0))
    rows = [
        {
            "block": index,
            "decision": decision.value,
            "size": unit(sum(a.bytes for a in block.activations if a.decision is decision)),
            "values": sum(a.decision is decision for a in block.activations),
            "module": block.module or block.name,
            "recompute": f"{block.recompute_us:.0f} us",
        }
        for index, block in enumerate(plan.blocks)
        for decision in Decision
        if any(a.decision is decision for a in block.activations)
    ]
    names = [decision.value for decision in Decision]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("block:O", title="blocks of forward, in order", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("size:Q", title=f"activations, {unit.name}"),
            color=alt.Color(
                "decision:N", title=None, sort=names, scale=alt.Scale(domain=names, range=list(_DECISIONS.values()))
            ),
            tooltip=["module:N", "decision:N", alt.Tooltip("size:Q", title=unit.name), "values:Q", "recompute:N"],
        )
        .properties(width="container", height=140, description=f"Activations of {len(plan.blocks)} blocks by decision")
    )


def lanes(plan: Plan) -> alt.Chart:
    """What computes and what is copied when: ops in a row of one phase and module drawn as one."""
    rows: list[dict[str, Any]] = []

    def add(lane: str, name: str, start_us: float, end_us: float) -> None:
        rows.append({"lane": lane, "name": name, "from": round(start_us / 1e3, 4), "to": round(end_us / 1e3, 4)})

    for (phase, module), group in itertools.groupby(plan.timeline, key=lambda m: (m.phase, _outer(m.module))):
        members = list(group)
        lane = "recompute" if phase == "recompute" else "compute"
        add(lane, f"{phase} of {module}" if module else phase, members[0].start_us, members[-1].end_us)
    for copy in plan.copies:
        add("copy in" if copy.is_back else "copy out", copy.name, copy.start_us, copy.end_us)
    names = [lane for lane in _LANES if any(row["lane"] == lane for row in rows)]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(height=16)
        .encode(
            x=alt.X("from:Q", title="time of the step, ms", scale=_TIGHT),
            x2="to:Q",
            y=alt.Y("lane:N", title=None, sort=names),
            color=alt.Color("lane:N", legend=None, scale=alt.Scale(domain=names, range=[_LANES[name] for name in names])),
            tooltip=["lane:N", "name:N", "from:Q", "to:Q"],
        )
        .properties(width="container", height=28 * len(names), description="Compute and copies over the step")
    )


def _outer(module: str) -> str:
    """The path down to the first number: a layer of a model."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def frontier(plans: Sequence[Plan], chosen: Plan | None = None) -> alt.LayerChart:
    """Step time against peak, with the plan that was chosen marked."""
    unit = _Unit.of(max(plan.peak_bytes for plan in plans))
    rows = [_point(plan, unit, False) for plan in plans] + ([_point(chosen, unit, True)] if chosen is not None else [])
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("peak:Q", title=f"peak, {unit.name}", scale=alt.Scale(zero=False)),
        y=alt.Y("ms:Q", title="predicted step, ms", scale=alt.Scale(zero=False)),
        tooltip=[
            alt.Tooltip("peak:Q", title=f"peak, {unit.name}"),
            alt.Tooltip("ms:Q", title="step, ms"),
            "grows:N",
            "saved:N",
        ],
    )
    line = base.transform_filter("!datum.chosen").mark_line(interpolate="step-before", color="#2563eb")
    points = base.transform_filter("!datum.chosen").mark_point(filled=True, size=50, color="#2563eb")
    layers: list[Any] = [line, points]
    if chosen is not None:
        layers.append(
            base.transform_filter("datum.chosen").mark_point(shape="diamond", size=180, color="#dc2626", strokeWidth=2.5)
        )
    return alt.layer(*layers).properties(width="container", height=220, description="Step time against peak memory of plans")


def _point(plan: Plan, unit: _Unit, is_chosen: bool) -> dict[str, Any]:
    return {
        "peak": unit(plan.peak_bytes),
        "ms": round(plan.step_us / 1e3, 3),
        "grows": f"{plan.step_us / (plan.baseline_step_us or 1) - 1:+.1%}",
        "saved": format_bytes(plan.saved_bytes),
        "chosen": is_chosen,
    }


def verification(found: Verification) -> alt.LayerChart:
    """Predicted and measured memory over one step; each phase takes its share of the width in either."""
    plan = found.plan
    unit = _Unit.of(max(found.peak_bytes, plan.peak_bytes))
    turn = next(i for i, moment in enumerate(plan.timeline) if moment.is_backward)
    predicted = [(moment.start_us, moment.live_bytes) for moment in plan.timeline]
    rows = _halves("predicted", predicted, plan.timeline[turn].start_us, plan.step_us, unit)
    rows += _halves("measured", found.measured, found.backward_us, found.measured[-1][0], unit)
    names = ["predicted", "measured"]
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X("at:Q", title="share of forward, and of backward", axis=alt.Axis(values=[0, 0.5, 1, 1.5, 2]), scale=_TIGHT),
            y=alt.Y("size:Q", title=f"allocated, {unit.name}"),
            color=alt.Color("what:N", title=None, sort=names, scale=alt.Scale(domain=names, range=["#2563eb", "#ea580c"])),
        )
    )
    turned = alt.Chart(alt.Data(values=[{"at": 1}])).mark_rule(strokeDash=[4, 3], color="gray").encode(x="at:Q")
    return alt.layer(lines, turned).properties(width="container", height=240, description="Predicted and measured memory")


def _halves(what: str, points: Sequence[tuple[float, int]], turn_us: float, end_us: float, unit: _Unit) -> list[dict[str, Any]]:
    """A timeline with forward from 0 to 1 and backward from 1 to 2, its highest points where there are many."""

    def place(us: float) -> float:
        return us / (turn_us or 1.0) if us < turn_us else 1 + (us - turn_us) / ((end_us - turn_us) or 1.0)

    placed = [(round(place(us) * COLUMNS / 2) * 2 / COLUMNS, size) for us, size in points]
    groups = itertools.groupby(placed, key=lambda point: point[0])
    return [{"what": what, "at": at, "size": unit(max(size for _, size in group))} for at, group in groups]


def save(chart: Any, path: str | Path, width: int = 720) -> None:
    """Write a chart as a picture or a page of its own, by the path's suffix."""
    kind = check_suffix(path)
    more = {"inline": True} if kind == "html" else {}
    chart.properties(width=width).save(str(path), format=kind, **more)


def check_suffix(path: str | Path) -> str:
    """The format that a path's suffix names. Raises RematError if there is none such."""
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise RematError(f"{path}: pictures are written as {', '.join(f'.{name}' for name in FORMATS)}")
    return kind


def svg(chart: Any, width: int = 720) -> str:
    """A chart as a static picture, to be put into HTML."""
    return vl_convert.vegalite_to_svg(chart.properties(width=width).to_dict())


@cache
def script() -> str:
    """All that draws charts in a browser: Vega, Vega-Lite and vega-embed in one piece."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
