"""When values leave and come back, worked out by hand: forward a, b, c of 1 us each, backward in reverse, 2 us each."""

from __future__ import annotations

from remat.program import Link, Move, Op, Program, Value
from remat.simulate import simulate
from remat.solvers.timetable import timetable

REGIONS = ((0, 4),)


def program(link: Link, regions_ready: bool = True) -> Program:
    forward = tuple(Op(name, 1.0, 0, (p - 1,) if p else (), (p,)) for p, name in enumerate("abcd"))
    backward = tuple(Op(f"{name}'", 2.0, 0) for name in "dcba")
    values = tuple(Value(name, 100, p, min(p + 1, 3), (7 - p,), 7 - p) for p, name in enumerate("abcd"))
    return Program(
        forward, backward, values, (), 0, tuple((7 - p, name) for p, name in enumerate("abcd")) if regions_ready else (), link
    )


def test_where_copies_stop_compute_nothing_is_started_early() -> None:
    step = program(Link(100.0, 100.0, overlaps=False))
    moves = timetable(step, (), {0, 1}, REGIONS)
    assert moves == {0: Move(1), 1: Move(2)}
    replay = simulate(step, (), moves)
    assert replay.stall_us == 4.0  # two values out and back, 1 us each
    assert (replay.host_bytes, replay.saved_bytes) == (200, 200)
    #                                a    b    c    d    d'   c'   b'   a'
    assert list(replay.live_bytes) == [100, 200, 200, 200, 200, 100, 100, 100]


def test_a_copy_that_hides_costs_no_time() -> None:
    step = program(Link(50.0, 50.0, overlaps=True))  # 2 us each way
    moves = timetable(step, (), {0}, REGIONS)
    assert moves == {0: Move(2, 6)}  # done when c ends; back while b' runs, which takes as long
    replay = simulate(step, (), moves)
    assert replay.stall_us == 0.0
    assert replay.timing.copies == ((0, False, 1.0, 3.0), (0, True, 8.0, 10.0))
    assert list(replay.live_bytes) == [100, 200, 300, 300, 300, 200, 200, 100]


def test_a_slow_link_stalls_and_the_replay_says_how_long() -> None:
    step = program(Link(25.0, 25.0, overlaps=True))  # 4 us each way
    moves = timetable(step, (), {0, 1}, REGIONS)
    assert moves == {0: Move(3, 5), 1: Move(3, 4)}  # the second is not out when forward ends: at 9 us instead of 4
    replay = simulate(step, (), moves)
    # out: 1 to 5, 5 to 9, and forward ends at 9; back: b from 9 to 13, wanted at 13; a from 13 to 17, wanted at 15
    assert replay.timing.copies == ((0, False, 1.0, 5.0), (1, False, 5.0, 9.0), (1, True, 9.0, 13.0), (0, True, 13.0, 17.0))
    assert replay.stall_us == 5.0 + 2.0


def test_an_input_of_a_region_stays_to_its_end() -> None:
    step = program(Link(100.0, 100.0, overlaps=False))
    assert timetable(step, (), {0}, ((0, 1), (1, 4))) == {0: Move(3)}


def test_without_moments_to_start_at_copies_back_wait_to_be_asked_for() -> None:
    step = program(Link(50.0, 50.0, overlaps=True), regions_ready=False)
    assert timetable(step, (), {0}, REGIONS)[0].reload in (-1, 4)


def test_a_value_from_which_others_are_recomputed_is_back_before_them() -> None:
    step = program(Link(100.0, 100.0, overlaps=False))
    moves = timetable(step, (1, 2), {0}, REGIONS)
    replay = simulate(step, (1, 2), moves)
    names = [(moment.phase, moment.name) for moment in replay.moments]
    assert names[4:8] == [("backward", "d'"), ("recompute", "b"), ("recompute", "c"), ("backward", "c'")]
    assert list(replay.live_bytes[4:8]) == [100, 200, 300, 300]  # d; a and b; and c
