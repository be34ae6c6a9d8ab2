"""Plans whose generated code has been asked for its peak: what door 2 chooses from when Inductor compiles.

The planner knows closely what Inductor will fuse and store; what the code really allocates is known once it has been
generated, which takes seconds. So few plans are asked for: the one that the planner thinks best for the budget first, and
by how far it was off tells which comes next. They stand on rungs that the budget does not move, so that close budgets get
the same plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from remat.budget import format_bytes
from remat.errors import BudgetError
from remat.planner import Menus, Solution, smallest_solution, solve
from remat.program import Program

_RUNGS = 240
_SLACK = 0.02  # of the budget: what may stay unused without a look at a higher rung
_LOOKS = 3  # plans to ask for at most once one fits
_LAST = (24, 12, 6, 0)  # rungs to ask for where the planner was too far off


@dataclass(frozen=True)
class Attempt:
    """A solution, its two graphs, and the peak of the step."""

    solution: Solution
    forward: fx.GraphModule
    backward: fx.GraphModule
    peak_bytes: int


@dataclass
class Ladder:
    """Plans for targets in geometric steps, from the smallest plan's peak (rung 0) to that of `everything`, saved."""

    program: Program
    menus: Menus
    everything: Solution
    apply: Callable[[Solution], Attempt]
    _tried: dict[int, Attempt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bottom = smallest_solution(self.program, self.menus)

    def fastest_within(self, limit: int) -> Attempt:
        """The fastest plan asked for whose generated code stays within `limit` bytes.

        Raises BudgetError when none fits; the minimum it names can be met.
        """
        fits, above, error = -1, _RUNGS + 1, 0  # the highest rung that fits, the lowest that does not; how far off the last was
        while fits < 0 or len(self._tried) < _LOOKS:
            rung = next((r for r in range(above - 1, fits, -1) if self._target(r) + error <= limit), None)
            if rung is None:
                break
            attempt = self._attempt(rung)
            error = attempt.peak_bytes - attempt.solution.replay.peak_bytes
            if attempt.peak_bytes > limit:
                above = rung
            else:
                fits = rung
                if attempt.peak_bytes >= limit * (1 - _SLACK):
                    break
        if fits < 0:
            fits = next((rung for rung in _LAST if self._attempt(rung).peak_bytes <= limit), -1)
        if fits < 0:
            least = min(self._attempt(rung).peak_bytes for rung in _LAST)
            raise BudgetError(
                f"no plan fits in {format_bytes(limit)} as Inductor compiles it; the smallest found needs "
                f"{format_bytes(least)} ({least} bytes). Raise budget=, or use compiler='eager'.",
                budget_bytes=limit,
                minimum_bytes=least,
                where="the generated code",
            )
        return self._attempt(fits)

    def _target(self, rung: int) -> int:
        low, high = self._bottom.replay.peak_bytes, self.everything.replay.peak_bytes
        return int(low * (high / low) ** (rung / _RUNGS))

    def _attempt(self, rung: int) -> Attempt:
        if rung not in self._tried:
            solution = self.everything if rung == _RUNGS else self._bottom
            if 0 < rung < _RUNGS:
                solution = solve(self.program, self.menus, self._target(rung))
            known = (
                a for a in self._tried.values() if (a.solution.dropped, a.solution.moves) == (solution.dropped, solution.moves)
            )
            self._tried[rung] = next(known, None) or self.apply(solution)
        return self._tried[rung]
