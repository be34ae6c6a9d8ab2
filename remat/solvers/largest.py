"""The largest size with room to spare, in few trials, since each is a capture and a plan.

The smallest peak grows almost linearly with a size, so that few steps of regula falsi (Dowell and Jarratt 1971) find the last
size that fits. `room` says how many bytes are left of the budget, and raises CaptureError where a model does not take a size.
"""

from __future__ import annotations

from collections.abc import Callable

from remat.errors import CaptureError, RematError, reason_of

_DOUBLINGS = 24  # of the example's size, after which there is no largest
_FARTHEST = 16  # times a size that fits to the next that is tried


def largest(room_at: Callable[[int], int], start: int, dim: str, least: int = 1) -> tuple[int, int, str]:
    """The largest size from `least` on that fits and the next, and why where the model does not take that. Where none fits 0,
    the smallest that it takes, and why it takes no smaller one."""
    low, high, limit = _bracket(room_at, start, dim, least)
    if not low:
        return low, high, limit
    spare = float(room_at(low))
    lacking = None if limit else float(room_at(high))  # None: the model does not take it
    fitted = None
    while high - low > 1:
        middle = (low + high) // 2
        if lacking is not None:
            middle = min(max(low + int(spare / (spare - lacking) * (high - low)), low + 1), high - 1)
        try:
            room = room_at(middle)
        except CaptureError as error:
            high, lacking, limit = middle, None, reason_of(error)
            continue
        if room >= 0:
            low, spare = middle, room
            if fitted and lacking is not None:  # the other end stays a second time: it counts half (Illinois)
                lacking /= 2
        else:
            high, lacking = middle, room
            if fitted is False:
                spare /= 2
        fitted = room >= 0
    return low, high, limit


def _bracket(room: Callable[[int], int], start: int, dim: str, least: int) -> tuple[int, int, str]:
    """A size that fits and a larger one that does not, and why where it is the model that does not take it. Where none fits as
    `largest`."""
    low, high = start, start
    if room(start) < 0:
        return _below(room, start, least)
    following = 2 * start
    while high < start << _DOUBLINGS:
        low, high = high, following
        try:
            left = room(high)
        except CaptureError as error:
            return low, high, reason_of(error)
        if left < 0:
            return low, high, ""
        reach = high + (high - low) * left // max(room(low) - left, 1) + 1  # the first that does not fit, were all this linear
        following = min(max(reach, 2 * high), _FARTHEST * high, start << _DOUBLINGS)
    raise RematError(f"the step fits at {dim} {high} and hardly grows with it; there is no largest size")


def _below(room: Callable[[int], int], high: int, least: int) -> tuple[int, int, str]:
    """`_bracket` below a size that does not fit."""
    refused, limit = least - 1, ""
    while high - refused > 1:
        middle = max(high // 2, least) if not limit else (refused + high) // 2
        try:
            if room(middle) >= 0:
                return middle, high, ""
            high = middle
        except CaptureError as error:
            refused, limit = middle, reason_of(error)
    return 0, high, limit
