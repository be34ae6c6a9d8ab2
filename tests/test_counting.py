"""How often each op really ran: what the plan drops runs once more, in backward, and nothing else does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import remat
from tests.models import build, mlp
from tests.steps import loss_of

FREE = {"aten.detach", "aten.view", "aten.t", "aten.transpose", "aten.expand", "aten._unsafe_view", "aten.unsqueeze"}


class Counting(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(model: Any, *args: Any, **kwargs: Any) -> tuple[Counter[str], Counter[str]]:
    """Ops of forward and of backward."""
    model.zero_grad(set_to_none=True)
    with Counting() as forward:
        loss = loss_of(model(*args, **kwargs), kwargs)
    with Counting() as backward:
        loss.backward()
    return forward.ran, backward.ran


def dropped_ops(plan: remat.Plan) -> Counter[str]:
    """The ops that the plan recomputes, as its timeline names them."""
    kinds = {a.name.split(".")[0]: a.op for block in plan.blocks for a in block.activations}
    return Counter(kinds[m.name] for m in plan.timeline if m.phase == "recompute" and m.name in kinds)


def differences(found: Counter[str], reference: Counter[str]) -> dict[str, int]:
    """How much more often each op ran, views and copies of metadata left out."""
    names = {name for name in found | reference if name.rsplit(".", 1)[0] not in FREE}
    return {name: found[name] - reference[name] for name in names if found[name] != reference[name]}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_recomputed_ops_run_once_more_and_no_others(share: float) -> None:
    model, x = mlp(layers=4)
    frontier = remat.frontier(model, (x,))
    low, high = frontier[-1].peak_bytes, frontier[0].peak_bytes
    module = remat.optimize(model, (x,), budget=int(low + share * (high - low)))
    plain = remat.optimize(model, (x,), budget=None)
    forward, backward = counted(module, x)
    plain_forward, plain_backward = counted(plain, x)
    assert differences(forward, plain_forward) == {}
    assert module.plan is not None
    recomputed = dropped_ops(module.plan)
    assert recomputed
    assert differences(backward, plain_backward) == dict(recomputed)


def test_with_nothing_to_recompute_the_ops_are_those_of_the_original() -> None:
    model, x = mlp(layers=4)
    forward, backward = counted(model, x)
    model.zero_grad(set_to_none=True)  # a step that adds to gradients has a plan of its own
    found_forward, found_backward = counted(remat.optimize(model, (x,), budget=None), x)
    for kernel in ("aten.mm.default", "aten.addmm.default", "aten.native_layer_norm.default", "aten.gelu.default"):
        assert found_forward[kernel] == forward[kernel]
        assert found_backward[kernel] == backward[kernel]


def test_matrix_products_of_a_transformer_in_backward() -> None:
    model, kwargs = build("llama")
    plain = remat.optimize(model, (), kwargs, budget=None)
    module = remat.optimize(model, (), kwargs, budget=remat.frontier(model, (), kwargs, points=2)[-1].peak_bytes)
    _, reference = counted(plain, **kwargs)
    _, backward = counted(module, **kwargs)
    assert module.plan is not None
    again = [m.name for m in module.plan.timeline if m.phase == "recompute"]
    assert backward["aten.mm.default"] - reference["aten.mm.default"] == len([n for n in again if n.startswith("mm")])
    repeats = dict(module.plan.repeats)
    assert Counter(again) == {name: (name in module.plan.dropped) + repeats.get(name, 0) for name in again}
