"""Where a forward pass is narrow: the cuts between blocks, with no knowledge of module names.

The bytes that cross a cut are those of values written before it and read by forward after it. Local minima of that curve
fall on the residual stream of a transformer, twice a block, and between the stages of a convolutional network. Values that
cross many cuts (rotary tables, masks, an encoder's output) raise the curve evenly and move no minimum.
"""

from __future__ import annotations

import itertools

from remat.program import Program

_PROMINENCE = 1.8  # between two cuts the curve must rise by this factor


def find_cuts(program: Program) -> tuple[int, ...]:
    """Forward positions that begin a block: 0, the narrow places, the ends of the program's parts, and the number of forward
    ops."""
    n = len(program.forward)
    crossing = _crossing_bytes(program)
    cuts, low, rising = [0], n, False
    low_at = high = 0
    for p in range(1, n):
        here = max(crossing[p], 1)
        if rising:
            high = max(high, here)
            if here * _PROMINENCE <= high:
                rising, low, low_at = False, here, p
        elif here <= low:
            low, low_at = here, p
        elif here >= low * _PROMINENCE:
            cuts.append(low_at)
            rising, high = True, here
    return tuple(sorted({*cuts, *itertools.chain(*program.parts), n}))


def _crossing_bytes(program: Program) -> list[int]:
    """Entry p: bytes of values written by ops before p and read by ops from p on."""
    delta = [0] * (len(program.forward) + 2)
    for value in program.values:
        last = min(value.last_forward, len(program.forward) - 1)
        if last > value.op:
            delta[value.op + 1] += value.bytes
            delta[last + 1] -= value.bytes
    return list(itertools.accumulate(delta))


def backward_cuts(program: Program, cuts: tuple[int, ...]) -> tuple[int, ...]:
    """For each forward cut the backward position from which on nothing written at or after the cut is held any more."""
    n = len(program.forward)
    last = [n] * (n + 1)
    for value in program.values:
        last[value.op] = max(last[value.op], value.release + 1)
    for p in range(n - 1, -1, -1):
        last[p] = max(last[p], last[p + 1])
    return tuple(last[cut] for cut in cuts[:-1]) + (n,)
