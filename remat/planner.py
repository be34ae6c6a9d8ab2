"""From a `Program` and a budget to decisions, read top to bottom. (DESIGN.md section 3.)"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from remat.budget import format_bytes
from remat.errors import BudgetError
from remat.program import Move, Program
from remat.simulate import Replay, simulate
from remat.solvers.improve import improve, prune
from remat.solvers.menu import Option, block_keys, make_menu, outside_bytes, slice_program
from remat.solvers.segment import backward_cuts, find_cuts
from remat.solvers.select import Choice, select
from remat.solvers.timetable import timetable

_MERGES = (1, 2, 4, 8)  # how many neighbouring blocks may run as one


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """No garbage collection meanwhile: it would walk the whole model, and planning leaves no cycles behind."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Solution:
    """Dropped ops, the regions they lie in (forward positions [start, stop)), the replay that says it fits, and what moves."""

    dropped: frozenset[int]
    regions: tuple[tuple[int, int], ...]
    replay: Replay
    moves: Mapping[int, Move] = field(default_factory=dict)


@dataclass(frozen=True)
class Menus:
    """All ways to run each stretch of neighbouring blocks; equal stretches share one menu object."""

    cuts: tuple[int, ...]
    outside: dict[tuple[int, int], tuple[int, int]]  # bytes live all through its forward and backward, besides it
    options: dict[tuple[int, int], tuple[Option, ...]]

    @cached_property
    def choices(self) -> dict[tuple[int, int], list[Choice]]:
        return {
            key: [
                Choice(
                    o.saved_bytes,
                    o.forward_bytes + self.outside[key][0],
                    o.backward_bytes + self.outside[key][1],
                    o.recompute_us,
                    i,
                )
                for i, o in enumerate(options)
            ]
            for key, options in self.options.items()
        }


@without_gc()
def make_menus(program: Program) -> Menus:
    """Segment the forward pass and solve each distinct stretch of blocks once."""
    cuts = find_cuts(program)
    back = backward_cuts(program, cuts)
    n_blocks = len(cuts) - 1
    keys = block_keys(program, cuts, back, reach=max(_MERGES))
    outside, options = {}, {}
    solved: dict[Hashable, tuple[Option, ...]] = {}
    for i in range(n_blocks):
        for width in _MERGES:
            j = i + width
            if j > n_blocks:
                break
            bounds = cuts[i], cuts[j], back[j], back[i]
            outside[i, j] = outside_bytes(program, *bounds)
            key = tuple(keys[i:j])
            if key not in solved:
                part = slice_program(program, *bounds)
                solved[key] = solved[part] = solved[part] if part in solved else make_menu(part)
            options[i, j] = solved[key]
    return Menus(cuts, outside, options)


@without_gc()
def solve(program: Program, menus: Menus, budget_bytes: int | None) -> Solution:
    """The fastest plan found whose replayed peak is within the budget. Raises BudgetError when there is none."""
    fastest = fastest_solution(program, menus)
    if budget_bytes is None or fastest.replay.peak_bytes <= budget_bytes:
        return fastest
    solution = _attempt(program, menus, budget_bytes)
    if solution is None:
        smallest = smallest_solution(program, menus)
        if smallest.replay.peak_bytes <= budget_bytes:
            return smallest
        where = smallest.replay.peak_at
        raise BudgetError(
            f"no plan fits in {format_bytes(budget_bytes)}; the smallest needs {format_bytes(smallest.replay.peak_bytes)} "
            f"({smallest.replay.peak_bytes} bytes), at {where.name} ({where.phase}). Raise budget=, or use a smaller batch.",
            budget_bytes=budget_bytes,
            minimum_bytes=smallest.replay.peak_bytes,
            where=f"{where.name} ({where.phase})",
        )
    return solution


def solution_of(
    program: Program, dropped: frozenset[int], offloaded: frozenset[int], regions: tuple[tuple[int, int], ...]
) -> Solution:
    """The solution with given decisions; regions are those that something happens in."""
    if not offloaded:
        regions = tuple((a, b) for a, b in regions if any(a <= p < b for p in dropped))
        return Solution(dropped, regions, simulate(program, dropped))
    moves = timetable(program, dropped, offloaded, regions)
    return Solution(dropped, regions, simulate(program, dropped, moves), moves)


def fastest_solution(program: Program, menus: Menus) -> Solution:
    """Nothing is recomputed that takes time: everything is saved but what a compiler fuses into its readers."""
    nothing = frozenset[int]()
    if all(value.passing for value in program.values):
        return Solution(nothing, (), simulate(program, nothing))
    path = select(menus.choices, len(menus.cuts) - 1, sum(value.bytes for value in program.values) * 10)
    assert path is not None
    dropped = prune(program, _dropped(menus, path))
    return Solution(dropped, _regions(menus, path, dropped), simulate(program, dropped))


@without_gc()
def smallest_solution(program: Program, menus: Menus) -> Solution:
    """The plan with the smallest peak that the planner knows."""
    best = fastest_solution(program, menus)
    low, high = program.resident_bytes, best.replay.peak_bytes
    while high - low > max(high // 2000, 1):
        middle = (low + high) // 2
        attempt = _attempt(program, menus, middle, tighten=False)
        if attempt is None:
            low = middle
            continue
        best = min(best, attempt, key=lambda s: s.replay.peak_bytes)
        high = min(middle, best.replay.peak_bytes)
    return best


def frontier_solutions(program: Program, menus: Menus, points: int) -> list[Solution]:
    """From the fastest plan to the smallest, each with a smaller peak and a longer step than the one before."""
    fastest = fastest_solution(program, menus)
    smallest = smallest_solution(program, menus)
    top, bottom = fastest.replay.peak_bytes, smallest.replay.peak_bytes
    found = [fastest, smallest]
    for k in range(1, points - 1):
        attempt = _attempt(program, menus, top - (top - bottom) * k // (points - 1))
        if attempt is not None:
            found.append(attempt)
    found.sort(key=lambda s: (s.replay.recompute_us, s.replay.peak_bytes))
    kept: list[Solution] = []
    for solution in found:
        if not kept or solution.replay.peak_bytes < kept[-1].replay.peak_bytes:
            kept.append(solution)
    return kept


def _attempt(program: Program, menus: Menus, budget_bytes: int, tighten: bool = True) -> Solution | None:
    """Select, and where the replay of the whole step disagrees with the sum of its blocks, aim lower by the difference."""
    choices, target = menus.choices, budget_bytes - program.resident_bytes
    for _ in range(8):
        path = select(choices, len(menus.cuts) - 1, target)
        if path is None:
            return None
        dropped = _dropped(menus, path)
        replay = simulate(program, dropped)
        if replay.peak_bytes <= budget_bytes:
            if tighten:
                dropped = improve(program, dropped, budget_bytes)
                replay = simulate(program, dropped)
            return Solution(dropped, _regions(menus, path, dropped), replay)
        missed = replay.peak_bytes - program.resident_bytes - _expected_peak(choices, path)
        target = min(target - 1, budget_bytes - program.resident_bytes - missed)
    return None


def _expected_peak(choices: dict[tuple[int, int], list[Choice]], path: list[tuple[int, int, int]]) -> int:
    saved = peak = 0
    for i, j, option in path:
        choice = choices[i, j][option]
        peak = max(peak, saved + choice.forward_bytes, saved + choice.backward_bytes)
        saved += choice.saved_bytes
    return peak


def _dropped(menus: Menus, path: list[tuple[int, int, int]]) -> frozenset[int]:
    return frozenset(menus.cuts[i] + p for i, j, o in path for p in menus.options[i, j][o].dropped)


def _regions(menus: Menus, path: list[tuple[int, int, int]], dropped: frozenset[int]) -> tuple[tuple[int, int], ...]:
    spans = [(menus.cuts[i], menus.cuts[j]) for i, j, _ in path]
    return tuple((a, b) for a, b in spans if any(a <= p < b for p in dropped))
