"""All ways to run each stretch of blocks, from saving everything to saving its input only. (DESIGN.md section 3.)"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from remat.program import Decision, Link, Op, Program
from remat.solvers.menu import Option, block_keys, make_menu, outside_bytes, slice_program
from remat.solvers.segment import backward_cuts, find_cuts
from remat.solvers.select import Choice

HOST_PRICE = 0.01  # of a copy's time, even where it hides: nothing moves for nothing
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
class Menus:
    """What can be chosen between the cuts of a program; made when first asked for, since many plans ask for nothing of it.

    Values may move to the host where `host_bytes`, what the host has for them, is not 0.
    """

    program: Program
    cuts: tuple[int, ...]
    host_bytes: int = 0

    @property
    def link(self) -> Link | None:
        return self.program.link

    @cached_property
    def bounds(self) -> dict[tuple[int, int], tuple[int, int, int, int]]:
        """Each stretch of neighbouring blocks that may run as one: where its forward and its backward start and stop."""
        cuts, back = self.cuts, self._back
        last = len(cuts) - 1
        pairs = ((i, i + width) for i in range(last) for width in _MERGES if i + width <= last)
        return {(i, j): (cuts[i], cuts[j], back[j], back[i]) for i, j in pairs if self.program.in_one_part(cuts[i], cuts[j])}

    @cached_property
    def options(self) -> dict[tuple[int, int], tuple[Option, ...]]:
        """The menu of each stretch. Equal stretches are solved once, and share one object."""
        with without_gc():
            program = self.program
            keys = block_keys(program, self.cuts, self._back, reach=max(_MERGES))
            may_move = program.link is not None and self.host_bytes > decided_bytes(program)
            least = _least_moved(program.link) if program.link is not None and may_move else None
            solved: dict[Hashable, tuple[Option, ...]] = {}
            found = {}
            for (i, j), bounds in self.bounds.items():
                key = tuple(keys[i:j])
                if key not in solved:
                    part = slice_program(program, *bounds)
                    solved[key] = solved[part] = solved[part] if part in solved else make_menu(part, least)
                found[i, j] = solved[key]
            return found

    @cached_property
    def choices(self) -> dict[tuple[int, int], list[Choice]]:
        return self.priced(HOST_PRICE / self.link.in_bytes_per_us if self.link is not None else 0.0)

    def priced(self, us_per_host_byte: float) -> dict[tuple[int, int], list[Choice]]:
        """What the selection chooses from, with a price on bytes that lie on the host."""
        return {
            key: [
                Choice(
                    o.saved_bytes,
                    o.forward_bytes + self._outside[key][0],
                    o.backward_bytes + self._outside[key][1],
                    o.recompute_us + self._stall_us(key, o) + us_per_host_byte * o.host_bytes,
                    i,
                )
                for i, o in enumerate(options)
            ]
            for key, options in self.options.items()
        }

    @cached_property
    def staying(self) -> dict[tuple[int, int], list[Choice]]:
        """The choices that move nothing but what a person has decided to move."""
        options = self.options
        least = {key: min(option.host_bytes for option in found) for key, found in options.items()}
        return {
            key: [choice for choice in choices if options[key][choice.index].host_bytes == least[key]]
            for key, choices in self.choices.items()
        }

    @cached_property
    def _back(self) -> tuple[int, ...]:
        """Where in backward the cuts lie."""
        return backward_cuts(self.program, self.cuts)

    @cached_property
    def _outside(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Bytes live all through a stretch's forward and backward, besides it."""
        return {key: outside_bytes(self.program, *bounds) for key, bounds in self.bounds.items()}

    @cached_property
    def _compute_us(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Of a stretch's forward and its backward."""
        n = len(self.program.forward)
        forward, backward = _prefix_sums(self.program.forward), _prefix_sums(self.program.backward)
        return {key: (forward[b] - forward[a], backward[d - n] - backward[c - n]) for key, (a, b, c, d) in self.bounds.items()}

    def _stall_us(self, key: tuple[int, int], option: Option) -> float:
        """Time that the stretch's copies take beyond its own compute, under which they hide where the link overlaps."""
        if self.link is None or not option.n_moved:
            return 0.0
        starts = (option.n_moved - 1) * self.link.start_us
        out, back = self.link.out_us(option.host_bytes) + starts, self.link.in_us(option.host_bytes) + starts
        if not self.link.overlaps:
            return out + back
        forward, backward = self._compute_us[key]
        return max(0.0, out - forward) + max(0.0, back - backward - option.recompute_us)


@without_gc()
def make_menus(program: Program, host_bytes: int = 0) -> Menus:
    """Segment the forward pass. `host_bytes` is what the host has for values; those that a person has decided to move come
    first, and are moved even if it has less."""
    return Menus(program, find_cuts(program), max(host_bytes, decided_bytes(program)))


def decided_bytes(program: Program) -> int:
    """Bytes of what a person has decided to move to the host."""
    return sum(program.values[v].bytes for p in program.pinned(Decision.OFFLOAD) for v in program.forward[p].outputs)


def _least_moved(link: Link) -> int:
    """Bytes below which starting a copy takes longer than the copy."""
    return int(link.start_us * min(link.out_bytes_per_us, link.in_bytes_per_us))


def _prefix_sums(ops: Sequence[Op]) -> list[float]:
    return list(itertools.accumulate((op.cost_us for op in ops), initial=0.0))
