"""Results that lie otherwise in memory than they were traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import remat
from remat._torch import OpOverload
from remat.capture import capture
from remat.passes.native_layouts import copy_for_views
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("after", [nn.ReLU, lambda: nn.Conv1d(16, 16, 3), nn.Identity], ids=["relu", "conv", "nothing"])
def test_what_reads_them_as_they_are_gets_no_copy(case: str, after: Callable[[], nn.Module]) -> None:
    class Kept(Turned):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.functions[0](self.ins[0](x).transpose(1, 2))).square().mean()

    torch.manual_seed(0)
    model, kwargs = Kept(CASES[case]), {"x": torch.randn(32, 24, 16)}
    model.after = after()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = run_step(model, kwargs)
    model.load_state_dict(state)
    outcome = run_step(remat.optimize(model, kwargs=kwargs, budget=None), kwargs)
    assert_same(plain, outcome)
    assert outcome.peak_bytes <= 1.01 * plain.peak_bytes


class _Reshaped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.logsigmoid(x).cos().transpose(1, 2).flatten()


def test_the_graph() -> None:
    turned = torch.randn(2, 3, 4).transpose(1, 2).requires_grad_()
    graph = capture(_Reshaped(), (turned,), {}).graph
    assert _ops(graph) == ["log_sigmoid_forward", "cos", "transpose", "clone", "view"]
    copy_for_views(graph)
    assert len(_ops(graph)) == 5


def test_images_with_their_channels_last_stay_so() -> None:
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten())
    before = _ops(capture(model, (x.contiguous(),), {}).graph)
    assert _ops(capture(model, (x,), {}).graph).count("clone") == before.count("clone") + 1  # which export has put there


def _ops(graph: fx.Graph) -> list[str]:
    targets = (node.target for node in graph.nodes)
    return [target.overloadpacket.__name__ for target in targets if isinstance(target, OpOverload)]
