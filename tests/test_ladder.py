"""Choosing among plans whose code has been asked for, with made-up code that needs more memory than the plan promises."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import fx

import remat
from remat.ladder import Attempt, Ladder
from remat.planner import Menus, Solution, fastest_solution, make_menus
from remat.program import Program
from tests.programs import stack


def ladder(program: Program, menus: Menus, code_bytes: Callable[[Solution], int]) -> Ladder:
    """A ladder as a new process would build it."""
    nothing = fx.GraphModule(torch.nn.Module(), fx.Graph())

    def apply(solution: Solution) -> Attempt:
        return Attempt(solution, nothing, nothing, code_bytes(solution))

    return Ladder(program, menus, fastest_solution(program, menus), apply)


def noisy(seed: int, least: float, most: float) -> Callable[[Solution], int]:
    """Code that needs between `least` and `most` times the plan's peak, the same for the same plan."""

    def code_bytes(solution: Solution) -> int:
        noise = random.Random(repr((seed, sorted(solution.dropped))))
        return int(solution.replay.peak_bytes * (noise.uniform(least, most) if solution.dropped else 1.0))

    return code_bytes


@pytest.mark.parametrize("seed", range(2))
def test_no_budget_has_a_higher_peak_than_a_larger_one(seed: int) -> None:
    program = stack(blocks=12)
    menus = make_menus(program)
    code_bytes = noisy(seed, 1.0, 1.03)
    most = fastest_solution(program, menus).replay.peak_bytes
    with pytest.raises(remat.BudgetError) as error:
        ladder(program, menus, code_bytes).fastest_within(1)
    least = error.value.minimum_bytes
    peaks = []
    for budget in range(least, most, (most - least) // 8):
        attempt = ladder(program, menus, code_bytes).fastest_within(budget)
        assert attempt.peak_bytes <= budget
        peaks.append(attempt.peak_bytes)
    assert peaks == sorted(peaks)
    assert len(set(peaks)) > 3


@pytest.mark.parametrize("seed", range(2))
def test_a_budget_that_is_said_to_work_does(seed: int) -> None:
    program = stack(blocks=8)
    menus = make_menus(program)
    code_bytes = noisy(seed, 0.3, 1.5)  # so far off that the search starts in the wrong place
    with pytest.raises(remat.BudgetError) as error:
        ladder(program, menus, code_bytes).fastest_within(1)
    least = error.value.minimum_bytes
    for budget in (least, least * 5 // 4, least * 2):
        assert ladder(program, menus, code_bytes).fastest_within(budget).peak_bytes <= budget


def test_where_the_planner_is_right_few_plans_are_compiled_and_little_room_is_left() -> None:
    program = stack(blocks=24)
    menus = make_menus(program)
    asked: list[Solution] = []

    def code_bytes(solution: Solution) -> int:
        asked.append(solution)
        return solution.replay.peak_bytes

    most = fastest_solution(program, menus).replay.peak_bytes
    budget = int(0.7 * most)
    attempt = ladder(program, menus, code_bytes).fastest_within(budget)
    assert attempt.peak_bytes >= 0.97 * budget
    assert len(asked) == 1


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_planner_that_is_off_by_a_tenth_needs_few_more(factor: float) -> None:
    program = stack(blocks=24)
    menus = make_menus(program)
    asked: list[Solution] = []

    def code_bytes(solution: Solution) -> int:
        asked.append(solution)
        return int(factor * solution.replay.peak_bytes)

    budget = int(0.6 * fastest_solution(program, menus).replay.peak_bytes)
    assert 0.97 * budget <= ladder(program, menus, code_bytes).fastest_within(budget).peak_bytes <= budget
    assert len(asked) <= 3
