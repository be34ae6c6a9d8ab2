"""Results that lie otherwise in memory than they were traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import remat
from remat.capture import capture
from remat.passes.native_layouts import lay_out_as_traced
from tests.steps import assert_same, run_step


class Turned(nn.Module):
    """Blocks that turn features in front of positions, and back, around `function`."""

    def __init__(self, function: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.ins, self.outs = (nn.ModuleList(nn.Linear(16, 16) for _ in range(2)) for _ in range(2))
        self.functions = nn.ModuleList(function() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for before, function, after in zip(self.ins, self.functions, self.outs, strict=True):
            x = x + after(function(before(x).transpose(1, 2)).transpose(1, 2))
        return x.square().mean()


CASES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(16),
    "without statistics": lambda: nn.BatchNorm1d(16, affine=False, track_running_stats=False),
    "frozen": lambda: nn.BatchNorm1d(16).eval(),
    "log sigmoid": nn.LogSigmoid,
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_copied_as_in_the_plain_model(case: str) -> None:
    torch.manual_seed(0)
    model, kwargs = Turned(CASES[case]), {"x": torch.randn(32, 24, 16)}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = run_step(model, kwargs)
    for budget in (None, 0.8):
        model.load_state_dict(state)
        module = remat.optimize(model, kwargs=kwargs, budget=budget)
        outcome = run_step(module, kwargs)
        assert_same(plain, outcome)
        assert 0.97 < outcome.peak_bytes / module.plan.peak_bytes <= 1


def test_the_graph() -> None:
    turned = torch.randn(2, 3, 4).transpose(1, 2).requires_grad_()
    graph = capture(nn.LogSigmoid(), (turned,), {}).graph
    assert [node.target.overloadpacket.__name__ for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)] == [
        "log_sigmoid_forward",
        "permute",
        "clone",
        "permute",
    ]
    before = str(graph)
    lay_out_as_traced(graph)
    assert str(graph) == before


def test_images_with_their_channels_last_stay_so() -> None:
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    graph = capture(nn.BatchNorm2d(4), (x,), {}).graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
