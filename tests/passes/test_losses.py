"""Cross-entropy a share of the rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remat.capture import capture
from remat.loss import cross_entropy
from remat.passes.losses import find_losses, share_losses
from tests.models import build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_loss_and_gradient_are_those_of_torch(dtype: torch.dtype, reduction: str, rows: int) -> None:
    torch.manual_seed(0)
    ours = torch.randn(rows, 37, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    target = torch.randint(0, 37, (rows,))
    target[rows // 2 :: 3] = -100
    target[0] = 5
    expected = nn.functional.cross_entropy(theirs.float(), target, reduction=reduction)
    found, _ = cross_entropy(ours, target, torch.float32, False, 1 if reduction == "mean" else 2, -100)
    assert torch.equal(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_the_ops_are_sound() -> None:
    logits, target = torch.randn(20, 5, requires_grad=True), torch.randint(0, 5, (20,))
    torch.library.opcheck(cross_entropy, (logits, target, torch.float32, False, 1, -100))


def test_the_cast_and_the_softmax_go() -> None:
    model, kwargs = build("llama")
    captured = capture(model.to(torch.bfloat16), (), kwargs)
    assert [node.name for node in find_losses(captured.graph)] == ["nll_loss_forward"]
    names = [node.name for node in captured.graph.nodes]
    shared = [node.name for node in share_losses(captured.graph).nodes]
    assert [name for name in names if name not in shared] == ["_to_copy_14", "view_25", "_log_softmax"]
    assert [name for name in shared if name not in names] == ["view_default"]


class Other(nn.Module):
    """Log-softmax that is read twice, and one along another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        twice = nn.functional.log_softmax(self.head(x), 1)
        across = nn.functional.cross_entropy(self.head(x).view(2, -1, 5).transpose(1, 2), y.view(2, -1))
        return nn.functional.nll_loss(twice, y) + twice.mean() + across


def test_what_is_no_plain_cross_entropy_stays() -> None:
    captured = capture(Other().train(), (torch.randn(6, 8), torch.randint(0, 5, (6,))), {})
    assert not find_losses(captured.graph)
