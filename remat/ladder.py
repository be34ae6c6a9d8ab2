"""Plans whose generated code has been asked for its peak: what door 2 chooses from when Inductor compiles.

The planner knows roughly what Inductor will fuse; what the code really allocates is known once it has been generated, which
takes seconds. So the plans to ask for stand on a ladder that the budget does not move: coarse rungs over the whole range,
fine ones between two of them. The highest coarse rung that fits is taken, then the highest above it that fits and needs no
less: so no budget gets a higher peak than a larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from remat.budget import format_bytes
from remat.errors import BudgetError
from remat.planner import Menus, Solution, smallest_solution, solve
from remat.program import Move, Program

_COARSE, _FINE = 12, 10  # coarse rungs, and steps from one to the next
_SLACK = 0.02  # of the budget: how much smaller than expected a plan's code may be
_FINE_SLACK = 0.01  # the same where the code of a coarse rung close by is known


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
    everything: Attempt
    apply: Callable[[Solution], Attempt]
    _solved: dict[int, Solution] = field(default_factory=dict)
    _tried: dict[tuple[frozenset[int], frozenset[tuple[int, Move]]], Attempt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bottom = smallest_solution(self.program, self.menus)

    def highest_within(self, limit: int) -> Attempt:
        """The fastest plan on the ladder whose generated code stays within `limit` bytes, which `everything`'s does not.

        Rungs whose plan promises more than the limit, by more than its code can be smaller, come last. Raises BudgetError
        when none fits; the minimum it names can be met.
        """
        rungs = range((_COARSE - 1) * _FINE, -1, -_FINE)
        offset = self.everything.peak_bytes - self.everything.solution.replay.peak_bytes
        likely = [rung for rung in rungs if self._target(rung) + offset <= limit * (1 + _SLACK)]
        candidates = [*likely, *sorted(set(rungs) - set(likely))]
        coarse = next((rung for rung in candidates if self._attempt(rung).peak_bytes <= limit), None)
        if coarse is None:
            smallest = min(self._tried.values(), key=lambda attempt: attempt.peak_bytes)
            raise BudgetError(
                f"no plan fits in {format_bytes(limit)} as Inductor compiles it; the smallest found needs "
                f"{format_bytes(smallest.peak_bytes)} ({smallest.peak_bytes} bytes). Raise budget=, or use compiler='eager'.",
                budget_bytes=limit,
                minimum_bytes=smallest.peak_bytes,
                where="the generated code",
            )
        base = self._attempt(coarse)
        offset = base.peak_bytes - base.solution.replay.peak_bytes
        for rung in range(coarse + _FINE - 1, coarse, -1):
            if self._target(rung) + offset > limit * (1 + _FINE_SLACK):
                continue
            if self._solution(rung).replay.added_us > base.solution.replay.added_us:
                continue
            attempt = self._attempt(rung)
            if base.peak_bytes <= attempt.peak_bytes <= limit:
                return attempt
        return base

    def _target(self, rung: int) -> int:
        low, high = self._bottom.replay.peak_bytes, self.everything.solution.replay.peak_bytes
        return int(low * (high / low) ** (rung / (_COARSE * _FINE)))

    def _solution(self, rung: int) -> Solution:
        if rung not in self._solved:
            self._solved[rung] = solve(self.program, self.menus, self._target(rung)) if rung else self._bottom
        return self._solved[rung]

    def _attempt(self, rung: int) -> Attempt:
        solution = self._solution(rung)
        decisions = solution.dropped, frozenset(solution.moves.items())
        if decisions not in self._tried:
            self._tried[decisions] = self.apply(solution)
        return self._tried[decisions]
