"""Several forwards before the first backward, as in the stages of a pipeline: what each keeps until its backward comes.

While one call's backward runs, the others have what they save. How much that is depends on the plan, which depends on how much
room they leave: the smallest amount that its own plan keeps to is found by bisection.
"""

from __future__ import annotations

import dataclasses

from remat.budget import format_bytes, format_needed
from remat.errors import BudgetError
from remat.menus import Menus
from remat.planner import Solution, smallest_solution, solve
from remat.program import Fixed
from remat.replay import Replay
from remat.simulate import simulate

_HALVINGS = 8


def kept_bytes(replay: Replay) -> int:
    """What one forward, with a loss outside of it, keeps until its backward begins, its outputs and inputs included."""
    n = len(replay.program.forward) + replay.program.loss_ops
    inputs = dict(replay.program.resident).get("inputs", 0)
    return inputs + sum(span.bytes for span in replay.spans if span.born < n <= span.dies)


def with_others(solution: Solution, others: int) -> Solution:
    """The same while `others` forwards, run in the same way, wait for their backward."""
    if not others:
        return solution
    program = solution.replay.program
    last = len(program.forward) + len(program.backward) - 1
    waiting = Fixed(0, last, others * kept_bytes(solution.replay), "activations")
    program = dataclasses.replace(program, fixed=(*program.fixed, waiting))
    replay = simulate(program, solution.dropped, solution.moves, solution.regions, solution.repeats)
    return dataclasses.replace(solution, replay=replay)


def solve_in_flight(menus: Menus, budget_bytes: int | None, others: int) -> Solution:
    """`solve`, while `others` forwards of the same plan wait for their backward."""
    if budget_bytes is None or not others:
        return with_others(solve(menus, budget_bytes), others)
    best = None
    low, high = 0, kept_bytes(simulate(menus.program, ()))
    for _ in range(_HALVINGS):
        assumed = (low + high) // 2
        try:
            found = solve(menus, budget_bytes - others * assumed)
        except BudgetError:
            high = assumed
            continue
        if kept_bytes(found.replay) <= assumed:
            best, high = found, assumed
        else:
            low = assumed
    if best is None:
        best = smallest_solution(menus)
    solution = with_others(best, others)
    replay = solution.replay
    if replay.peak_bytes > budget_bytes:
        raise BudgetError(
            f"no plan fits in {format_bytes(budget_bytes)} with {others + 1} forwards in flight; the smallest found needs "
            f"{format_needed(replay.peak_bytes)}. Raise budget=, use smaller microbatches or fewer.",
            budget_bytes=budget_bytes,
            minimum_bytes=replay.peak_bytes,
            where=str(replay.peak_at),
        )
    return solution
