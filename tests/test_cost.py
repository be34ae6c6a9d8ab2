"""What ops cost whose arithmetic is in no table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remat.cost import op_cost_us
from remat.devices import CPU

S, E, K, N = 4096, 4, 192, 512


@torch.library.custom_op("remat_tests::grouped", mutates_args=())
def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("remat_tests::grouped_backward", mutates_args=())
def grouped_backward(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight)]


@torch.library.custom_op("remat_tests::gate", mutates_args=())
def gate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


X, WEIGHT, ENDS, RESULT = (torch.empty(*shape, device="meta") for shape in ((S, K), (E, K, N), (E,), (S, N)))
PRODUCT_US = 2 * S * K * N / CPU.flop_per_us(torch.float32)


@pytest.mark.parametrize(
    ("op", "args", "out", "products"),
    [
        (grouped, (X, WEIGHT, ENDS), RESULT, 1),
        (grouped_backward, (X, WEIGHT, RESULT), [X, WEIGHT], 2),
    ],
    ids=["forward", "backward"],
)
def test_products_of_other_libraries_are_known_by_their_shapes(op: Any, args: Any, out: Any, products: int) -> None:
    cost = op_cost_us(op._opoverload, args, {}, out, CPU)
    assert cost == pytest.approx(products * PRODUCT_US + CPU.launch_us)


def test_an_op_of_equal_matrices_is_no_product() -> None:
    square = torch.empty(2048, 2048, device="meta")
    cost = op_cost_us(gate._opoverload, (square, square), {}, square, CPU)
    assert cost == pytest.approx(3 * square.nbytes / CPU.bytes_per_us + CPU.launch_us)
