"""Choosing plans to compile, with made-up code that needs more memory than the plan promises."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable

import pytest

import remat
from remat.ladder import Attempt, Ladder
from remat.menus import Menus, make_menus
from remat.planner import fastest_solution
from remat.program import Fixed
from tests.programs import stack


def within(menus: Menus, code_bytes: Callable[[Attempt], int], limit: int) -> int:
    """The peak of what a new process would choose, and that it is what it compiled last."""
    search = Ladder(menus, fastest_solution(menus)).within(limit)
    peak = code_bytes(next(search))
    with contextlib.suppress(StopIteration):
        while True:
            peak = code_bytes(search.send(peak))
    return peak


def noisy(seed: int, least: float, most: float) -> Callable[[Attempt], int]:
    """Code that needs between `least` and `most` times the plan's peak, the same for the same plan."""

    def code_bytes(attempt: Attempt) -> int:
        solution = attempt.solution
        noise = random.Random(repr((seed, sorted(solution.dropped), attempt.is_sparing)))
        return int(solution.replay.peak_bytes * (noise.uniform(least, most) if solution.dropped else 1.0))

    return code_bytes


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_budget_has_a_higher_peak_than_a_larger_one(seed: int) -> None:
    program = stack(blocks=12)
    menus = make_menus(program)
    code_bytes = noisy(seed, 1.0, 1.03)
    most = fastest_solution(menus).replay.peak_bytes
    with pytest.raises(remat.BudgetError) as error:
        within(menus, code_bytes, 1)
    least = error.value.minimum_bytes
    peaks = []
    for budget in range(least, most, (most - least) // 8):
        peaks.append(within(menus, code_bytes, budget))
        assert peaks[-1] <= budget
    assert peaks == sorted(peaks)
    assert len(set(peaks)) > 3


@pytest.mark.parametrize("seed", range(2))
def test_a_budget_that_is_said_to_work_does(seed: int) -> None:
    program = stack(blocks=8)
    menus = make_menus(program)
    code_bytes = noisy(seed, 0.3, 1.5)  # so far off that the search starts in the wrong place
    with pytest.raises(remat.BudgetError) as error:
        within(menus, code_bytes, 1)
    least = error.value.minimum_bytes
    for budget in (least, least * 5 // 4, least * 2):
        assert within(menus, code_bytes, budget) <= budget


def test_where_the_planner_is_right_few_plans_are_compiled_and_little_room_is_left() -> None:
    program = stack(blocks=24)
    menus = make_menus(program)
    asked: list[Attempt] = []

    def code_bytes(attempt: Attempt) -> int:
        asked.append(attempt)
        return attempt.solution.replay.peak_bytes

    most = fastest_solution(menus).replay.peak_bytes
    budget = int(0.7 * most)
    assert within(menus, code_bytes, budget) >= 0.96 * budget
    assert len(asked) == 1


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_planner_that_is_off_by_a_tenth_needs_few_more(factor: float) -> None:
    program = stack(blocks=24)
    menus = make_menus(program)
    asked: list[Attempt] = []

    def code_bytes(attempt: Attempt) -> int:
        asked.append(attempt)
        return int(factor * attempt.solution.replay.peak_bytes)

    budget = int(0.6 * fastest_solution(menus).replay.peak_bytes)
    assert 0.96 * budget <= within(menus, code_bytes, budget) <= budget
    assert len(asked) <= 3


def test_fusion_that_costs_memory_goes_last() -> None:
    program = stack(blocks=8)
    menus = make_menus(program)
    asked: list[bool] = []

    def code_bytes(attempt: Attempt) -> int:
        asked.append(attempt.is_sparing)
        return attempt.solution.replay.peak_bytes + (0 if attempt.is_sparing else most)

    most = fastest_solution(menus).replay.peak_bytes
    assert within(menus, code_bytes, most - 1) < most
    assert asked == sorted(asked)
    assert sum(asked) == 1


def test_values_that_are_nothing_next_to_what_is_fixed() -> None:
    program = stack(blocks=2)
    fused = tuple(value._replace(passing_bytes=0) for value in program.values)
    program = dataclasses.replace(program, values=fused, fixed=(Fixed(0, 2 * len(program.forward) - 1, 10**9),))
    assert fastest_solution(make_menus(program)).replay.peak_bytes > 10**9
