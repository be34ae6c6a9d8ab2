"""Menus of single blocks, and the slices they are made from."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from hypothesis import given, settings

from remat.program import Fixed, Op, Program, Value
from remat.simulate import simulate
from remat.solvers.menu import block_keys, make_menu, outside_bytes, slice_program
from remat.solvers.segment import backward_cuts
from tests.programs import programs, stack


def block() -> Program:
    """The second of four equal blocks, on its own."""
    return slice_program(stack(blocks=4), 3, 6, 18, 21)


def test_equal_blocks_have_equal_slices() -> None:
    program = stack(blocks=5)
    second = slice_program(program, 3, 6, 24, 27)
    third = slice_program(program, 6, 9, 21, 24)
    assert second == third


@settings(max_examples=200, deadline=None)
@given(program=programs())
def test_stretches_with_equal_keys_have_equal_slices(program: Program) -> None:
    assert_equal_keys_mean_equal_slices(program)


def test_equal_blocks_have_equal_keys() -> None:
    program = stack(blocks=12)
    keys = assert_equal_keys_mean_equal_slices(program)
    assert len(set(keys)) <= 3  # the first and the last differ


def assert_equal_keys_mean_equal_slices(program: Program) -> list[Hashable]:
    cuts = tuple(range(0, len(program.forward), 3)) + (len(program.forward),)
    back = backward_cuts(program, cuts)
    keys = block_keys(program, cuts, back, reach=2)
    seen: dict[Hashable, Program] = {}
    for i, j in [(i, i + width) for width in (1, 2) for i in range(len(keys) - width + 1)]:
        part = slice_program(program, cuts[i], cuts[j], back[j], back[i])
        assert seen.setdefault(tuple(keys[i:j]), part) == part
    return keys


def test_values_that_leave_the_block_are_pinned() -> None:
    pinned = [value.pinned for value in block().values]
    assert pinned == ["", "", "leaves the block"]


def test_a_menu_runs_from_fastest_to_smallest() -> None:
    menu = make_menu(block())
    assert menu[0].dropped == frozenset()
    assert menu[0].recompute_us == 0
    assert menu[0].saved_bytes == 210
    assert menu[-1].saved_bytes == 10
    times = [option.recompute_us for option in menu]
    saved = [option.saved_bytes for option in menu]
    assert times == sorted(times)
    assert saved == sorted(saved, reverse=True)


def test_what_is_live_all_through_is_an_offset() -> None:
    program = stack(blocks=3)
    with_outside = Program(program.forward, program.backward, program.values, (Fixed(0, 17, 7), Fixed(9, 17, 3)), 0)
    middle = (3, 6, 12, 15)
    assert outside_bytes(with_outside, *middle) == (7, 10)
    assert slice_program(with_outside, *middle).fixed == ()
    last = (6, 9, 9, 12)  # 3 bytes are born in its own backward
    assert outside_bytes(with_outside, *last) == (7, 7)
    assert [item.bytes for item in slice_program(with_outside, *last).fixed] == [3]


@settings(max_examples=100, deadline=None)
@given(program=programs(fixed=False))
def test_an_option_costs_what_the_simulator_says(program: Program) -> None:
    for option in make_menu(program):
        replay = simulate(program, option.dropped)
        assert option.recompute_us == replay.recompute_us
        assert option.saved_bytes == replay.saved_bytes
        assert max(option.forward_bytes, option.backward_bytes) == replay.peak_bytes
        assert not any(program.values[v].pinned for p in option.dropped for v in program.forward[p].outputs)


@settings(max_examples=100, deadline=None)
@given(program=programs())
def test_no_option_is_worse_than_another_in_every_respect(program: Program) -> None:
    rows = [(o.saved_bytes, o.forward_bytes, o.backward_bytes, o.recompute_us) for o in make_menu(program)]
    assert rows
    assert len(set(rows)) == len(rows) or len(rows) == 1
    for a, b in itertools.permutations(rows, 2):
        assert a == b or not all(x <= y for x, y in zip(a, b, strict=True))


def test_a_block_without_results_has_one_option() -> None:
    empty = Program((Op("view", 0.0, 0),), (Op("", 0.0, 0),), (), (), 0)
    (option,) = make_menu(empty)
    assert option.dropped == frozenset()


def test_pinned_values_are_never_dropped() -> None:
    values = (Value("a", 100, 0, 1, (2,), 2, "random"), Value("b", 10, 1, 1, (2,), 2))
    program = Program((Op("a", 1.0, 0, (), (0,)), Op("b", 1.0, 0, (0,), (1,))), (Op("b'", 1.0, 0),), values, (), 0)
    assert all(0 not in option.dropped for option in make_menu(program))
