"""One figure everywhere: table, page, JSON, trace and snapshot say the same."""

from __future__ import annotations

import json
import pickle
import re
from typing import Any

import pytest

from remat.budget import format_bytes
from remat.program import KINDS
from tests.views.cases import with_copies, with_inductor, with_recompute


@pytest.mark.parametrize("make", [with_recompute, with_copies, pytest.param(with_inductor, marks=pytest.mark.slow)])
def test_all_five_say_the_same(make: Any) -> None:
    plan = make()
    data = json.loads(plan.to_json())
    trace = json.loads(plan.to_trace())
    counters = [event["args"] for event in trace["traceEvents"] if event["ph"] == "C"]
    page, table = plan.to_html(), plan.summary()
    peak = plan.peak_bytes
    assert data["peak_bytes"] == trace["otherData"]["peak_bytes"] == peak
    assert max(moment["live_bytes"] for moment in data["timeline"]) == max(sum(c.values()) for c in counters) == peak
    for size in (peak, plan.baseline_peak_bytes, plan.saved_bytes, *([plan.host_bytes] if plan.host_bytes else [])):
        assert format_bytes(size) in table
        assert format_bytes(size) in page
    assert data["step_us"] == trace["otherData"]["step_us"] == plan.step_us == pytest.approx(data["timeline"][-1]["end_us"])
    assert f"{plan.step_us / 1e3:.1f} ms" in page

    live: dict[str, int] = dict.fromkeys(KINDS, 0)
    category, at_peak, total, highest = {}, {}, 0, 0
    for event in pickle.loads(plan.to_snapshot())["device_traces"][0]:
        if event["action"] == "alloc":
            category[event["addr"]] = {"unknown": "others"}.get(event["category"], event["category"])
        sign = {"alloc": 1, "free_completed": -1}.get(event["action"], 0)
        live[category[event["addr"]]] += sign * event["size"]
        total += sign * event["size"]
        if total > highest:
            highest, at_peak = total, {kind: size for kind, size in live.items() if size}
    top = max(counters, key=lambda sizes: sum(sizes.values()))
    assert at_peak == {kind: size for kind, size in top.items() if size} == plan.at_peak()
    for kind, size in at_peak.items():
        assert f"{kind} {format_bytes(size)}" in table
        assert re.search(rf">{kind}</th><td class=\"number\">{re.escape(format_bytes(size))}</td>", page)
