"""Plans as JSON: what is written is read back, and what is no plan is refused with the place."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import remat
from remat.plan_file import FORMAT, schema
from tests.models import build

PUBLISHED = Path(__file__).parent.parent / "docs" / "plan.schema.json"


@functools.cache
def plans() -> tuple[remat.Plan, remat.Plan]:
    """One with recompute, copies and formulas; one with neither."""
    model, kwargs = build("llama")
    dims = {"input_ids": {0: "batch"}, "labels": {0: "batch"}}
    full = remat.plan(model, (), kwargs, budget=None, policy="offload", dynamic_shapes=dims)
    return full, remat.plan(model, (), kwargs, budget=None)


def data() -> dict[str, Any]:
    return json.loads(plans()[0].to_json())


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_round_trip(which: int) -> None:
    plan = plans()[which]
    text = plan.to_json()
    again = remat.Plan.from_json(text)
    assert again == plan
    assert again.decisions == plan.decisions
    assert again.to_json() == text
    assert again.summary() == plan.summary()
    assert json.loads(text)["peak_bytes"] == plan.peak_bytes


def test_a_rich_plan_was_tried() -> None:
    plan = plans()[0]
    assert plan.copies
    assert plan.transfers
    assert plan.peak_formula is not None
    assert plan.peak_bytes_at(batch=4) == remat.Plan.from_json(plan.to_json()).peak_bytes_at(batch=4)


@pytest.mark.parametrize("which", [0, 1])
def test_files_meet_the_published_schema(which: int) -> None:
    published = json.loads(PUBLISHED.read_text())
    assert published == schema(), "write it again: python -m remat.plan_file > docs/plan.schema.json"
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.Draft202012Validator(published).validate(json.loads(plans()[which].to_json()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cut off"),
        ("no json", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no format"),
        ("null", "no format"),
        ("{}", "no format"),
        ('"text"', "no format"),
        ('{"format": "3"}', "no format"),
        ('{"format": 1}', "format 1, of an older remat"),
        ('{"format": 99}', f"format 99, of a newer remat; this one reads {FORMAT}. Update"),
        (f'{{"format": {FORMAT}, "blocks": [{{}}]}}', "missing"),
    ],
)
def test_what_is_not_a_plan_is_refused(text: str, said: str) -> None:
    with pytest.raises(remat.RematError, match=said):
        remat.Plan.from_json(text)


def test_a_file_cut_off_anywhere_is_refused() -> None:
    text = plans()[0].to_json().rstrip()
    for end in range(0, len(text), len(text) // 50):
        with pytest.raises(remat.RematError, match="cut off"):
            remat.Plan.from_json(text[:end])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unknown": 1}, "plan.unknown is unknown"),
        ({"timeline": None}, "plan.timeline is null, not of type array"),
        ({"peak_bytes": "big"}, 'plan.peak_bytes is "big", not of type integer'),
        ({"peak_bytes": True}, "plan.peak_bytes is true, not of type integer"),
        ({"budget_bytes": 1.5}, "plan.budget_bytes is 1.5"),
        ({"regions": [["a"]]}, r"plan.regions\[0\] has 1 items, not 2"),
        ({"inputs": [{"name": "x", "shape": [1], "dtype": 3}]}, r"plan.inputs\[0\].dtype is 3, not of type string"),
    ],
)
def test_a_file_with_other_fields_is_refused_with_the_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(remat.RematError, match=said):
        remat.Plan.from_json(json.dumps({**data(), **change}))


def test_an_unknown_decision_is_refused() -> None:
    changed = data()
    block = next(i for i, block in enumerate(changed["blocks"]) if block["activations"])
    changed["blocks"][block]["activations"][0]["decision"] = "forget"
    with pytest.raises(remat.RematError, match=r"decision is 'forget', not one of"):
        remat.Plan.from_json(json.dumps(changed))


def test_a_plan_for_another_model_is_refused_with_the_difference() -> None:
    model, kwargs = build("gpt2")
    with pytest.raises(remat.RematError, match="the model: LlamaForCausalLM there, GPT2LMHeadModel here"):
        remat.optimize(model, (), kwargs, budget=None, plan=plans()[1])


def test_a_plan_for_another_shape_is_refused_with_the_difference() -> None:
    model, kwargs = build("llama")
    fewer = {name: value[:2] for name, value in kwargs.items()}
    with pytest.raises(remat.RematError, match="an input: input_ids 4x64 int64 there, input_ids 2x64 int64 here"):
        remat.optimize(model, (), fewer, budget=None, plan=plans()[1])
