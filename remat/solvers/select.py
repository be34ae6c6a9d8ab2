"""One option per block: minimal recompute time such that the step fits at every moment.

While a block runs backward, all that was saved before it and its own working set must fit: a multiple-choice knapsack with
prefix constraints, solved by dynamic programming over states (saved bytes, time), keeping those that no other state beats.
Adjacent blocks may also run as one, saving nothing at the cut between them (the segments of Chen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_STATES = 256


@dataclass(frozen=True)
class Choice:
    """Costs of running blocks [i, j) as one in a given way; bytes as in `menu.Option`, with the block's offsets added."""

    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    recompute_us: float
    index: int


def select(
    choices: Mapping[tuple[int, int], Sequence[Choice]], n_blocks: int, budget_bytes: int
) -> list[tuple[int, int, int]] | None:
    """The cheapest way through blocks 0 … n_blocks-1 as (first, last + 1, option index) triples; None if nothing fits.

    `budget_bytes` is what the blocks may use: resident memory is already taken off.
    """
    empty = np.zeros(0, dtype=np.int64)
    saved, back = [empty] * (n_blocks + 1), [np.zeros((0, 3), dtype=np.int64)] * (n_blocks + 1)
    time = [np.zeros(0)] * (n_blocks + 1)
    saved[0], time[0] = np.zeros(1, dtype=np.int64), np.zeros(1)
    arriving: dict[int, list[tuple[int, Choice]]] = {}
    for (i, j), menu in choices.items():
        arriving.setdefault(j, []).extend((i, choice) for choice in menu)
    for j in range(1, n_blocks + 1):
        bytes_here, time_here, origin = [empty], [np.zeros(0)], [np.zeros((0, 3), dtype=np.int64)]
        for i, choice in arriving.get(j, ()):
            room = budget_bytes - max(choice.forward_bytes, choice.backward_bytes)
            fits = int(np.searchsorted(saved[i], room, side="right"))  # states are in order of saved bytes
            if fits:
                bytes_here.append(saved[i][:fits] + choice.saved_bytes)
                time_here.append(time[i][:fits] + choice.recompute_us)
                origin.append(np.column_stack((np.full(fits, i), np.full(fits, choice.index), np.arange(fits))))
        all_saved, all_time = np.concatenate(bytes_here), np.concatenate(time_here)
        keep = _undominated(all_saved, all_time)
        saved[j], time[j], back[j] = all_saved[keep], all_time[keep], np.concatenate(origin)[keep]
    if not time[n_blocks].size:
        return None
    state, j, path = int(np.argmin(time[n_blocks])), n_blocks, []
    while j > 0:
        i, option, before = (int(x) for x in back[j][state])
        path.append((i, j, option))
        j, state = i, before
    return path[::-1]


def _undominated(saved: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Indices of states that no other beats, by rising saved bytes; thinned evenly when there are too many."""
    order = np.argsort(saved, kind="stable")  # a merge sort, and what comes in is sorted runs
    best = np.minimum.accumulate(time[order])
    better = np.ones(order.size, dtype=bool)
    better[1:] = time[order][1:] < best[:-1] - 1e-12
    kept = order[better]
    if kept.size > _STATES:
        kept = kept[np.unique(np.linspace(0, kept.size - 1, _STATES).astype(int))]
    return kept
