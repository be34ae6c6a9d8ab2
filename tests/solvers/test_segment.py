"""Cuts fall where a forward pass is narrow."""

from __future__ import annotations

from hypothesis import given, settings

from remat.program import Op, Program, Value
from remat.solvers.segment import backward_cuts, find_cuts
from tests.programs import programs, stack


def forward_only(sizes: list[int], last: list[int]) -> Program:
    """Value p has `sizes[p]` bytes and is last read by op `last[p]`."""
    ops = tuple(Op(f"f{p}", 1.0, 0, (), (p,)) for p in range(len(sizes)))
    values = tuple(Value(f"v{p}", size, p, last[p]) for p, size in enumerate(sizes))
    return Program(ops, (), values, (), 0)


def test_cuts_of_equal_blocks_fall_between_them() -> None:
    cuts = find_cuts(stack(blocks=4))
    assert cuts == (0, 3, 6, 9, 12)


def test_a_flat_curve_is_one_block() -> None:
    assert find_cuts(forward_only([10] * 6, [1, 2, 3, 4, 5, 5])) == (0, 6)


def test_a_value_that_crosses_all_cuts_moves_none() -> None:
    sizes, last = [100, 100, 10] * 3, [min(p + 1, 8) for p in range(9)]
    plain = find_cuts(forward_only(sizes, last))
    with_table = find_cuts(forward_only([20, *sizes], [9, *(p + 1 for p in last)]))
    assert plain[1:] == (3, 6, 9)
    assert with_table[1:] == (4, 7, 10)


def test_an_empty_forward_has_no_blocks() -> None:
    assert find_cuts(Program((), (), (), (), 0)) == (0,)


@settings(max_examples=100, deadline=None)
@given(program=programs(most_ops=8))
def test_cuts_rise_from_the_first_op_to_the_last(program: Program) -> None:
    cuts = find_cuts(program)
    assert cuts[0] == 0
    assert cuts[-1] == len(program.forward)
    assert list(cuts) == sorted(set(cuts))


@settings(max_examples=100, deadline=None)
@given(program=programs(most_ops=8))
def test_nothing_from_behind_a_cut_is_held_past_its_backward_cut(program: Program) -> None:
    cuts = find_cuts(program)
    back = backward_cuts(program, cuts)
    assert len(back) == len(cuts)
    assert list(back) == sorted(back, reverse=True)
    for cut, end in zip(cuts, back, strict=True):
        assert all(value.release < end for value in program.values if value.op >= cut)


def test_backward_cuts_of_equal_blocks() -> None:
    program = stack(blocks=2)
    assert backward_cuts(program, (0, 3, 6)) == (12, 9, 6)
