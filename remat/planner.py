"""From a `Program` and a budget to decisions, read top to bottom. (DESIGN.md section 3.)"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from remat.budget import format_bytes, format_needed
from remat.errors import BudgetError, HostBudgetError
from remat.menus import HOST_PRICE, Menus, without_gc
from remat.program import Decision, Move, Program
from remat.replay import Replay
from remat.simulate import simulate
from remat.solvers.improve import improve, prune
from remat.solvers.menu import Option, recomputed_for_nothing
from remat.solvers.moves import Found
from remat.solvers.search import search, shrunk
from remat.solvers.select import Choice, select
from remat.solvers.timetable import timetable

_PRICES = 10  # higher ones, tried by bisection where the host has less than what would move


@dataclass(frozen=True)
class Solution:
    """Dropped ops, the regions they lie in (forward positions [start, stop)), the replay that says it fits, what moves, and how
    often results are let go of before their last reader (`remat.schedule`)."""

    dropped: frozenset[int]
    regions: tuple[tuple[int, int], ...]
    replay: Replay
    moves: Mapping[int, Move] = field(default_factory=dict)
    repeats: Mapping[int, int] = field(default_factory=dict)


@without_gc()
def solve(menus: Menus, budget_bytes: int | None) -> Solution:
    """The fastest plan found whose replayed peak is within the budget. Raises BudgetError when there is none."""
    fastest = fastest_solution(menus)
    if budget_bytes is None or fastest.replay.peak_bytes <= budget_bytes:
        return fastest
    solution = _attempt(menus, budget_bytes)
    if solution is None:
        smallest = smallest_solution(menus)
        if smallest.replay.peak_bytes <= budget_bytes:
            return _searched(menus.program, smallest, budget_bytes, tuple(itertools.pairwise(menus.cuts)))
        _check_host(menus, budget_bytes)
        where = smallest.replay.peak_at
        more = ", or allow offload with host_budget=" if menus.link is not None and not menus.host_bytes else ""
        raise BudgetError(
            f"no plan fits in {format_bytes(budget_bytes)}; the smallest needs {format_needed(smallest.replay.peak_bytes)}, "
            f"at {where}. Raise budget=, use a smaller batch{more}.",
            budget_bytes=budget_bytes,
            minimum_bytes=smallest.replay.peak_bytes,
            where=str(where),
        )
    return solution


def _check_host(menus: Menus, budget_bytes: int) -> None:
    """Raises HostBudgetError if more host memory would do."""
    if not menus.host_bytes:
        return
    unbounded = dataclasses.replace(menus, host_bytes=sum(value.bytes for value in menus.program.values))
    solution = _attempt(unbounded, budget_bytes)
    if solution is None:
        return
    needed = solution.replay.host_bytes
    raise HostBudgetError(
        f"no plan fits in {format_bytes(budget_bytes)} with {format_bytes(menus.host_bytes)} of host memory; with "
        f"{format_needed(needed)} one does. Raise host_budget=, or budget=.",
        budget_bytes=menus.host_bytes,
        minimum_bytes=needed,
        where="host memory",
    )


def solution_of(
    program: Program, dropped: frozenset[int], offloaded: frozenset[int], regions: tuple[tuple[int, int], ...]
) -> Solution:
    """The solution with given decisions; regions are those that something happens in."""
    if not offloaded:
        regions = _active(program, dropped, regions)
        return Solution(dropped, regions, simulate(program, dropped, None, regions))
    moves = timetable(program, dropped, offloaded, regions)
    return Solution(dropped, regions, simulate(program, dropped, moves, regions), moves)


def _found(program: Program, found: Found, spans: tuple[tuple[int, int], ...]) -> Solution:
    regions = _active(program, found.decided, spans)
    replay = simulate(program, found.dropped, None, regions, found.repeats)
    return Solution(found.dropped, regions, replay, repeats=found.repeats)


def _active(program: Program, again: frozenset[int], regions: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The regions in which something is computed again."""
    return tuple((a, b) for a, b in joined(program, again, regions) if any(a <= p < b for p in again))


def joined(program: Program, dropped: frozenset[int], regions: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Regions run as one where forward reads in one what is dropped in another."""
    last = [max((program.values[v].last_forward for v in program.forward[p].outputs), default=p) for p in sorted(dropped)]
    reach = dict(zip(sorted(dropped), last, strict=True))
    merged: list[tuple[int, int]] = []
    until = 0
    for start, stop in regions:
        if merged and until >= start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
        until = max([until, *(reach[p] for p in range(start, stop) if p in reach)])
    return tuple(merged)


def fastest_solution(menus: Menus) -> Solution:
    """Nothing is recomputed that takes time: everything is saved but what a compiler fuses into its readers, and what a person
    has decided otherwise about."""
    program = menus.program
    dropped, moved = program.pinned(Decision.RECOMPUTE), program.pinned(Decision.OFFLOAD)
    if any(not value.passing for value in program.values):
        dropped = prune(program, dropped | recomputed_for_nothing(program))
    return solution_of(program, dropped, moved, tuple(itertools.pairwise(menus.cuts)) if dropped or moved else ())


@without_gc()
def smallest_solution(menus: Menus) -> Solution:
    """The plan with the smallest peak that the planner knows."""
    for choices in itertools.chain([menus.choices], map(menus.priced, _rising_prices(menus))):
        best = _smallest_among(menus, choices)
        if best.replay.host_bytes <= menus.host_bytes:
            return best
    return _smallest_among(menus, menus.staying)


def _rising_prices(menus: Menus) -> Iterator[float]:
    """Prices on a byte of host memory, in microseconds, to the one at which nothing moves that need not."""
    if menus.link is not None:
        yield from np.geomspace(10 * HOST_PRICE / menus.link.in_bytes_per_us, menus.program.step_us, 5).tolist()


def _smallest_among(menus: Menus, choices: dict[tuple[int, int], list[Choice]]) -> Solution:
    """The selection at the smallest target that has one is not always the one with the smallest replay: all are replayed."""
    best = fastest_solution(menus)
    low, high = 0, best.replay.peak_bytes - menus.program.resident_bytes
    while high - low > max(high // 2000, 1):
        target = (low + high) // 2
        path = select(choices, len(menus.cuts) - 1, target)
        if path is None:
            low = target
            continue
        best = min(best, _solution(menus, path), key=lambda s: s.replay.peak_bytes)
        high = target
    return best if best.moves else _shrunk(menus.program, best, tuple(itertools.pairwise(menus.cuts)))


def _shrunk(program: Program, solution: Solution, spans: tuple[tuple[int, int], ...]) -> Solution:
    """A plan near this one with a smaller peak, value by value. A faster plan at the same peak may leave room for another."""
    smaller = _found(program, shrunk(program, solution.dropped, spans), spans)
    while True:
        solution = min(solution, smaller, key=lambda s: s.replay.peak_bytes)
        faster = _searched(program, solution, solution.replay.peak_bytes, spans)
        again = _found(program, shrunk(program, faster.dropped, spans), spans)
        smaller = min(faster, again, key=lambda s: s.replay.peak_bytes)
        if smaller.replay.peak_bytes >= solution.replay.peak_bytes:
            return solution


def frontier_solutions(menus: Menus, points: int) -> list[Solution]:
    """From the fastest plan to the smallest, each with a smaller peak and a longer step than the one before."""
    fastest = fastest_solution(menus)
    smallest = smallest_solution(menus)
    top, bottom = fastest.replay.peak_bytes, smallest.replay.peak_bytes
    found = [fastest, smallest]
    for k in range(1, points - 1):
        attempt = _attempt(menus, top - (top - bottom) * k // (points - 1))
        if attempt is not None:
            found.append(attempt)
    found.sort(key=lambda s: (s.replay.added_us, s.replay.peak_bytes))
    kept: list[Solution] = []
    for solution in found:
        if not kept or solution.replay.peak_bytes < kept[-1].replay.peak_bytes:
            kept.append(solution)
    return kept


def _attempt(menus: Menus, budget_bytes: int) -> Solution | None:
    """A plan within the budget and within what the host has; None when none is found."""
    solution = _attempt_with(menus, menus.choices, budget_bytes)
    if solution is None or solution.replay.host_bytes <= menus.host_bytes:
        return solution
    assert menus.link is not None
    low = HOST_PRICE / menus.link.in_bytes_per_us
    price = menus.program.step_us  # for one byte: then nothing moves that need not
    best, high = _attempt_with(menus, menus.staying, budget_bytes), price
    for _ in range(_PRICES):
        solution = _attempt_with(menus, menus.priced(price), budget_bytes)
        if solution is not None and solution.replay.host_bytes <= menus.host_bytes:
            best, high = solution, price
        elif price == high:
            return best
        else:
            low = price
        price = math.sqrt(low * high)
    return best


def _attempt_with(menus: Menus, choices: dict[tuple[int, int], list[Choice]], budget_bytes: int) -> Solution | None:
    """Select, and where the replay of the whole step disagrees with the sum of its blocks, aim lower by the difference."""
    target = budget_bytes - menus.program.resident_bytes
    for _ in range(8):
        path = select(choices, len(menus.cuts) - 1, target)
        if path is None:
            return None
        solution = _solution(menus, path)
        if solution.replay.peak_bytes <= budget_bytes:
            return _tightened(menus, path, solution, budget_bytes)
        missed = solution.replay.peak_bytes - menus.program.resident_bytes - _expected_peak(menus, path)
        target = min(target - 1, budget_bytes - menus.program.resident_bytes - missed)
    return None


def _solution(menus: Menus, path: list[tuple[int, int, int]]) -> Solution:
    dropped = _positions(menus, path, lambda option: option.dropped)
    offloaded = _positions(menus, path, lambda option: option.offloaded)
    return solution_of(menus.program, dropped, offloaded, _spans(menus, path))


def _tightened(menus: Menus, path: list[tuple[int, int, int]], solution: Solution, budget_bytes: int) -> Solution:
    dropped = improve(menus.program, solution.dropped, budget_bytes, solution.moves, solution.regions)
    better = solution_of(menus.program, dropped, frozenset(solution.moves), _spans(menus, path))
    if better.replay.peak_bytes <= budget_bytes:
        solution = better
    return _searched(menus.program, solution, budget_bytes, _spans(menus, path))


def _searched(program: Program, solution: Solution, budget_bytes: int, spans: tuple[tuple[int, int], ...]) -> Solution:
    """A faster plan near this one, value by value; where values move to the host the plan as it is."""
    if solution.moves:
        return solution
    found = _found(program, search(program, solution.dropped, budget_bytes, spans, solution.repeats), spans)
    return found if found.replay.peak_bytes <= budget_bytes else solution


def _expected_peak(menus: Menus, path: list[tuple[int, int, int]]) -> int:
    saved = peak = 0
    for i, j, option in path:
        choice = menus.choices[i, j][option]
        peak = max(peak, saved + choice.forward_bytes, saved + choice.backward_bytes)
        saved += choice.saved_bytes
    return peak


def _positions(menus: Menus, path: list[tuple[int, int, int]], of: Callable[[Option], frozenset[int]]) -> frozenset[int]:
    return frozenset(menus.cuts[i] + p for i, j, o in path for p in of(menus.options[i, j][o]))


def _spans(menus: Menus, path: list[tuple[int, int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple((menus.cuts[i], menus.cuts[j]) for i, j, _ in path)
