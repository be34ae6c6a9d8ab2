"""The public surface, frozen."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import pytest
import torch

import remat
from remat import _torch


def test_integrations_need_no_import_of_their_own() -> None:
    assert all(map(callable, (remat.hf.RematCallback, remat.lightning.RematCallback, remat.distributed.plan)))
    assert not hasattr(remat, "jax")


def test_an_integration_whose_library_is_not_there_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "remat.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(AttributeError, match=r"remat\.lightning cannot be imported: .* \(pip install 'remat\[lightning\]'\)"):
        remat.__getattr__("lightning")


def test_names() -> None:
    assert remat.__all__ == [
        "Activation",
        "Block",
        "BudgetError",
        "CaptureError",
        "Check",
        "CompiledPlan",
        "Decision",
        "DeviceProfile",
        "Fit",
        "Formula",
        "HostBudgetError",
        "Measurement",
        "Plan",
        "Preparation",
        "RematError",
        "RewriteError",
        "Transfer",
        "Verification",
        "disable",
        "enable",
        "explain",
        "fit",
        "frontier",
        "measure",
        "optimize",
        "optimize_blocks",
        "plan",
        "plan_of",
        "plans",
        "prepare_for_training",
        "profile_device",
        "report",
        "to_dot",
        "verify",
    ]
    assert all(hasattr(remat, name) for name in remat.__all__)


def parameters(function: object) -> str:
    """Names and defaults, without annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


COMMON = (
    "(model, args=(), kwargs=None, *, budget, policy='auto', optimizer=None, dynamic_shapes=None, plan=None, "
    "trainable_only=True, host_budget=None, pin=None, costs='analytic')"
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimize", COMMON.replace("'analytic')", "'analytic', in_flight=1, loss=None, holds_outputs=True)")),
        ("plan", COMMON.replace("'analytic')", "'analytic', device=None, in_flight=1, loss=None, holds_outputs=True)")),
        (
            "frontier",
            "(model, args=(), kwargs=None, *, budget=None, optimizer=None, host_budget=None, pin=None, costs='analytic', "
            "device=None, in_flight=1, loss=None, holds_outputs=True, points=12)",
        ),
        (
            "fit",
            "(model, args=(), kwargs=None, *, budget, dim='batch', dynamic_shapes=None, multiple_of=1, policy='auto', "
            "optimizer=None, trainable_only=True, host_budget=None, pin=None, costs='analytic', device=None, "
            "in_flight=1, loss=None, holds_outputs=True)",
        ),
        ("measure", "(fn)"),
        ("verify", "(model_or_step, plan=None, args=(), kwargs=None)"),
        ("report", "(model, path='remat-report.zip')"),
        ("to_dot", "(graph)"),
        ("profile_device", "(device=None, *, again=False)"),
        ("plans", "(compiled)"),
        ("explain", "(model, args=(), kwargs=None, *, budget=None)"),
    ],
)
def test_signatures(name: str, expected: str) -> None:
    assert parameters(getattr(remat, name)) == expected


def test_a_plan_has_what_was_promised() -> None:
    promised = {
        "budget_bytes", "peak_bytes", "baseline_peak_bytes", "resident_bytes", "saved_bytes", "recompute_us", "step_us",
        "baseline_step_us", "planning_seconds", "blocks", "timeline",
    }  # fmt: skip
    assert promised <= {field.name for field in dataclasses.fields(remat.Plan)}
    for name in ("decisions", "summary", "to_json", "from_json", "to_html", "to_trace", "to_snapshot", "at_peak"):
        assert hasattr(remat.Plan, name)


def test_the_error_tree() -> None:
    for error in (remat.BudgetError, remat.CaptureError, remat.RewriteError):
        assert issubclass(error, remat.RematError)
    assert issubclass(remat.BudgetError, ValueError)
    assert issubclass(remat.HostBudgetError, remat.BudgetError)
    error = remat.BudgetError("text", budget_bytes=1, minimum_bytes=2, where="mm")
    assert (error.budget_bytes, error.minimum_bytes, error.where) == (1, 2, "mm")


def test_decisions_are_the_words_of_torch() -> None:
    assert [decision.name for decision in remat.Decision] == ["SAVE", "RECOMPUTE", "OFFLOAD"]


def test_what_is_shared_of_torch_is_named() -> None:
    """All that remat/_torch.py defines for others stands in its list."""
    own = [name for name, value in vars(_torch).items() if getattr(value, "__module__", None) == _torch.__name__]
    assert {name for name in own if not name.startswith("_")} <= set(_torch.__all__)


def test_the_backend_is_registered() -> None:
    assert "remat" in torch._dynamo.list_backends()
