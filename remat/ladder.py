"""Which plans door 2 compiles for a budget when Inductor is the compiler.

The planner knows closely what Inductor will fuse and store; what the code really allocates is known once it has been
generated, which takes seconds. So few plans are compiled: the one that the planner thinks best for the budget first, and by
how far it was off tells which comes next. They stand on rungs that the budget does not move, so that close budgets get the
same plan.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from remat.budget import format_bytes, format_needed
from remat.errors import BudgetError
from remat.menus import Menus
from remat.planner import Solution, smallest_solution, solve

_RUNGS = 240
_MARGIN = 0.01  # of the budget: what the first plan leaves
_SLACK = 0.03  # of the budget: what may stay unused without a look at a higher rung
_LOOKS = 3  # plans to compile at most once one fits
_TRIES = 6  # plans to compile at most where none fits, before the last ones
_LAST = ((24, False), (12, False), (6, False), (0, False), (12, True), (0, True))  # where the planner was too far off


class Attempt(NamedTuple):
    """A plan to compile; where `is_sparing`, without fusion that costs memory."""

    solution: Solution
    is_sparing: bool = False

    @property
    def decisions(self) -> Hashable:
        """Equal for attempts that give the same code."""
        solution = self.solution
        return solution.dropped, frozenset(solution.repeats.items()), frozenset(solution.moves.items()), self.is_sparing


@dataclass
class Ladder:
    """Plans for targets in geometric steps, from the smallest plan's peak (rung 0) to that of `everything`, saved."""

    menus: Menus
    everything: Solution
    _rungs: dict[int, Solution] = field(default_factory=dict)
    _peaks: dict[Hashable, int] = field(default_factory=dict)

    @cached_property
    def smallest(self) -> Solution:
        """Found when first asked for, since it takes time, and what `everything` fits does not ask for it."""
        return smallest_solution(self.menus)

    def within(self, limit: int) -> Generator[Attempt, int, None]:
        """Plans to compile, each answered with the peak in bytes of its generated code; the last one is the one to take.

        Raises BudgetError when none stays within `limit` bytes; the minimum it names can be met.
        """
        fits, above, looks, is_sparing = -1, _RUNGS + 1, 0, False  # the highest rung that fits, the lowest that does not
        error = 0 if self.everything.replay.peak_bytes <= limit else int(_MARGIN * limit)  # how far off the last plan was
        while looks < (_TRIES if fits < 0 else _LOOKS):
            rung = next((r for r in range(above - 1, fits, -1) if self._target(r) + error <= limit), None)
            if rung is None:
                break
            peak = yield from self._compiled(rung)
            looks += 1
            error = peak - self._solution(rung).replay.peak_bytes
            if peak > limit:
                above = rung
            else:
                fits = rung
                if peak >= limit * (1 - _SLACK):
                    break
        peaks: list[int] = []
        for rung, is_sparing in _LAST if fits < 0 else ():
            if rung and self._solution(rung).replay.peak_bytes > limit:
                continue
            peaks.append((yield from self._compiled(rung, is_sparing)))
            if peaks[-1] <= limit:
                fits = rung
                break
        if fits < 0:
            raise BudgetError(
                f"no plan fits in {format_bytes(limit)} as Inductor compiles it; the smallest found needs "
                f"{format_needed(min(peaks))}. Raise budget=, or use compiler='eager'.",
                budget_bytes=limit,
                minimum_bytes=min(peaks),
                where="the generated code",
            )
        attempt = Attempt(self._solution(fits), is_sparing)
        if attempt.decisions != next(reversed(self._peaks)):
            yield attempt  # once more: its code is in Inductor's cache

    def _compiled(self, rung: int, is_sparing: bool = False) -> Generator[Attempt, int, int]:
        attempt = Attempt(self._solution(rung), is_sparing)
        if attempt.decisions not in self._peaks:
            self._peaks[attempt.decisions] = yield attempt
        return self._peaks[attempt.decisions]

    def _target(self, rung: int) -> int:
        high = self.everything.replay.peak_bytes
        if rung == _RUNGS:
            return high
        low = self.smallest.replay.peak_bytes
        return int(low * (high / low) ** (rung / _RUNGS))

    def _solution(self, rung: int) -> Solution:
        if rung in (0, _RUNGS):
            return self.everything if rung else self.smallest
        if rung not in self._rungs:
            self._rungs[rung] = solve(self.menus, self._target(rung))
        return self._rungs[rung]
