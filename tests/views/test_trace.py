"""Chrome traces of the planned step."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest

import remat
from remat.program import KINDS
from remat.views.trace import LANES
from tests.views.cases import with_copies, with_recompute

NUMBER = {"type": "number", "minimum": 0}
SIZES = {"additionalProperties": NUMBER}
SLICE = {"required": ["ts", "dur", "tid", "cat"], "properties": {"ph": {"const": "X"}, "ts": NUMBER, "dur": NUMBER}}
COUNTER = {"required": ["ts"], "properties": {"ph": {"const": "C"}, "ts": NUMBER, "args": SIZES}}
NAME = {"required": ["tid"], "properties": {"ph": {"const": "M"}, "args": {"required": ["name"]}}}
SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "traceEvents": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "ph", "pid", "args"],
                "oneOf": [SLICE, COUNTER, NAME],
            },
        },
    },
}
PLANS = pytest.mark.parametrize("make", [with_recompute, with_copies])


def events(plan: remat.Plan, kind: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(plan.to_trace())["traceEvents"] if event["ph"] == kind]


@PLANS
def test_it_has_the_form_of_a_trace(make: Any, tmp_path: Any) -> None:
    text = make().to_trace(tmp_path / "step.trace")
    assert (tmp_path / "step.trace").read_text() == text
    jsonschema.validate(json.loads(text), SCHEMA)


@PLANS
def test_lanes_do_not_overlap(make: Any) -> None:
    for lane in range(len(LANES)):
        own = sorted((event["ts"], event["ts"] + event["dur"]) for event in events(make(), "X") if event["tid"] == lane)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(own))


def test_copies_have_lanes_of_their_own() -> None:
    plan = with_copies()
    lanes = [event["tid"] for event in events(plan, "X")]
    assert lanes.count(0) == len(plan.timeline)
    assert lanes.count(1) == lanes.count(2) == len(plan.copies) / 2 > 0
    assert {event["args"]["name"] for event in events(plan, "M")} >= set(LANES)


@PLANS
def test_the_counter_is_the_timeline(make: Any) -> None:
    plan = make()
    totals = [sum(event["args"].values()) for event in events(plan, "C")]
    assert totals == [moment.live_bytes for moment in plan.timeline]
    assert max(totals) == plan.peak_bytes
    assert set(events(plan, "C")[0]["args"]) <= set(KINDS)
