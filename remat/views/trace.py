"""The planned step as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Lanes: what computes, what is copied to the host, what is copied back. A counter: memory by kind.
"""

from __future__ import annotations

import json
from typing import Any

from remat.plan import Plan
from remat.program import KINDS

LANES = ("compute", "copy out", "copy in")


def to_trace(plan: Plan) -> str:
    """The trace as JSON text (Trace Event Format, times in microseconds)."""
    events = [_named("process_name", 0, f"{plan.model or 'step'} as planned on {plan.device}")]
    events += [_named("thread_name", LANES.index(lane), lane) for lane in LANES]
    kinds = [kind for k, kind in enumerate(KINDS) if any(moment.by_kind[k] for moment in plan.timeline)]
    for moment in plan.timeline:
        about = {"module": moment.module, "live_bytes": moment.live_bytes}
        events.append(_slice("compute", moment.name, moment.phase, moment.start_us, moment.end_us, about))
        sizes = {kind: moment.by_kind[KINDS.index(kind)] for kind in kinds}
        events.append({"name": "memory", "ph": "C", "pid": 0, "ts": moment.start_us, "args": sizes})
    for copy in plan.copies:
        lane = LANES[2 if copy.is_back else 1]
        events.append(_slice(lane, copy.name, "copy", copy.start_us, copy.end_us, {"bytes": copy.bytes}))
    about = {"peak_bytes": plan.peak_bytes, "budget_bytes": plan.budget_bytes, "step_us": plan.step_us}
    return json.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events})


def _named(what: str, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": lane, "args": {"name": name}}


def _slice(lane: str, name: str, category: str, start: float, end: float, about: dict[str, Any]) -> dict[str, Any]:
    timing = {"ts": start, "dur": end - start}
    return {"name": name, "cat": category, "ph": "X", "pid": 0, "tid": LANES.index(lane), **timing, "args": about}
