"""The referee: made-up steps whose peaks are worked out by hand, and a second, naive replay that shares nothing with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remat.program import Fixed, Op, Program, Value
from remat.schedule import unpacking
from remat.simulate import simulate
from remat.solvers.moves import repeatable
from tests.programs import programs


def chain() -> Program:
    """Three forward ops a → b → c, each 100 bytes, backward in reverse; every value read by its own backward op."""
    forward = (
        Op("a", 1.0, 0, (), (0,)),
        Op("b", 2.0, 0, (0,), (1,)),
        Op("c", 4.0, 0, (1,), (2,)),
    )
    backward = (Op("c'", 1.0, 0), Op("b'", 1.0, 0), Op("a'", 1.0, 0))
    values = (
        Value("a", 100, 0, 1, (5,), 5),
        Value("b", 100, 1, 2, (4,), 4),
        Value("c", 100, 2, 2, (3,), 3),
    )
    return Program(forward, backward, values, (), resident_bytes=1000)


def live(program: Program, dropped: tuple[int, ...], repeats: Mapping[int, int] | None = None) -> list[tuple[str, str, int]]:
    moments = simulate(program, dropped, repeats=repeats).moments
    return [(m.phase, m.name, m.live_bytes - program.resident_bytes) for m in moments]


def test_everything_saved() -> None:
    assert live(chain(), ()) == [
        ("forward", "a", 100),
        ("forward", "b", 200),
        ("forward", "c", 300),
        ("backward", "c'", 300),
        ("backward", "b'", 200),
        ("backward", "a'", 100),
    ]
    replay = simulate(chain(), ())
    assert (replay.peak_bytes, replay.saved_bytes, replay.recompute_us, replay.recomputed) == (1300, 300, 0.0, ())


def test_a_dropped_value_is_recomputed_just_in_time() -> None:
    assert live(chain(), (1,)) == [
        ("forward", "a", 100),
        ("forward", "b", 200),
        ("forward", "c", 300),  # c reads b while it makes its own result
        ("backward", "c'", 200),
        ("recompute", "b", 200),
        ("backward", "b'", 200),
        ("backward", "a'", 100),
    ]


def test_room_is_what_is_left_while_backward_runs() -> None:
    assert simulate(chain(), (1,)).room(1300) == {"c'": 100, "b": 100, "b'": 100, "a'": 200}


def test_what_a_region_reads_stays_to_its_end() -> None:
    forward = tuple(Op(name, 1.0, 0, inputs, (p,)) for p, (name, inputs) in enumerate([("a", ()), ("b", (0,)), ("c", (1,))]))
    values = tuple(Value(name, 100, p, min(p + 1, 2)) for p, name in enumerate("abc"))
    program = Program(forward, (Op("end", 0.0, 0),), values, (), 0)
    assert simulate(program, ()).live_bytes == (100, 200, 200, 0)
    assert simulate(program, (), regions=((1, 3),)).live_bytes == (100, 200, 300, 0)
    assert simulate(program, (), regions=((0, 3),)).live_bytes == (100, 200, 200, 0)
    assert simulate(program, (), regions=((2, 3),)).live_bytes == (100, 200, 200, 0)


def test_a_dropped_chain_is_recomputed_from_its_source_and_held_to_its_last_reader() -> None:
    assert live(chain(), (0, 1, 2)) == [
        ("forward", "a", 100),
        ("forward", "b", 200),
        ("forward", "c", 200),  # a is gone: nobody in forward reads it any more
        ("recompute", "a", 100),
        ("recompute", "b", 200),
        ("recompute", "c", 300),
        ("backward", "c'", 300),
        ("backward", "b'", 200),
        ("backward", "a'", 100),
    ]
    replay = simulate(chain(), (0, 1, 2))
    assert replay.recomputed == (0, 1, 2)
    assert replay.recompute_us == 7.0
    assert replay.saved_bytes == 0


def test_a_repeated_value_is_in_memory_only_for_what_reads_it() -> None:
    assert live(chain(), (0, 1, 2), {0: 1, 1: 1}) == [
        ("forward", "a", 100),
        ("forward", "b", 200),
        ("forward", "c", 200),
        ("recompute", "a", 100),
        ("recompute", "b", 200),
        ("recompute", "c", 200),  # a has been read
        ("backward", "c'", 100),  # and b
        ("recompute", "a", 100),
        ("recompute", "b", 200),
        ("backward", "b'", 200),  # a is not to go a second time
        ("backward", "a'", 100),
    ]
    replay = simulate(chain(), (0, 1, 2), repeats={0: 1, 1: 1})
    assert (replay.recomputed, replay.recompute_us) == ((0, 1, 2, 0, 1), 10.0)
    assert simulate(chain(), (0, 1, 2), repeats={0: 2, 1: 1}).recomputed == (0, 1, 2, 0, 1, 0)


def test_a_saved_value_is_let_go_of_once_backward_has_read_it() -> None:
    first, *others = chain().values
    program = dataclasses.replace(chain(), values=(first._replace(reads=(3, 5)), *others))
    assert live(program, (), {0: 1}) == [
        ("forward", "a", 100),
        ("forward", "b", 200),
        ("forward", "c", 300),
        ("backward", "c'", 300),
        ("backward", "b'", 100),
        ("recompute", "a", 100),
        ("backward", "a'", 100),
    ]
    assert simulate(program, (), repeats={0: 1}).saved_bytes == 300


@settings(max_examples=300, deadline=None)
@given(program=programs(), data=st.data())
def test_repeats_agree_with_a_naive_replay(program: Program, data: st.DataObject) -> None:
    dropped = frozenset(data.draw(st.sets(st.integers(0, len(program.forward) - 1))))
    repeats = {op: data.draw(st.integers(1, 3)) for op in sorted(repeatable(program)) if data.draw(st.booleans())}
    replay = simulate(program, dropped, repeats=repeats)
    assert [*replay.live_bytes] == naive_live(program, dropped, repeats)


def naive_live(program: Program, dropped: frozenset[int], repeats: Mapping[int, int]) -> list[int]:
    """Bytes during each op, by making copies of values and noting when each is first and last of use."""
    n, m = len(program.forward), len(program.backward)
    steps: list[tuple[int, bool]] = [(p, False) for p in range(n)]
    copies = [[v, value.op, value.last_forward] for v, value in enumerate(program.values)]  # value, first and last step
    present = {v: copy for v, copy in enumerate(copies) if program.values[v].op not in dropped}
    left = {op: repeats.get(op, 0) for op in range(n)}
    ends: list[tuple[list[int], int]] = []  # copies that stay to a position of backward
    used: set[int] = set()

    def read(v: int) -> None:
        if v not in present:
            for source in program.forward[v].inputs:
                if source not in present:
                    read(source)
            for source in program.forward[v].inputs:
                present[source][2] = max(present[source][2], len(steps))
                used.add(source)
            present[v] = [v, len(steps), len(steps)]
            copies.append(present[v])
            steps.append((v, True))
        used.add(v)

    for b in range(n, n + m):
        wanted = [v for v, value in enumerate(program.values) if b in value.reads]
        for v in wanted:
            read(v)
        until = min([p for p in unpacking(program) if p > b], default=n + m) - 1
        ends += [(present[v], until) for v in wanted]
        steps.append((b, False))
        for v in used:
            if left[v]:
                left[v] -= 1
                del present[v]
        used.clear()
    ends += [(copy, program.values[v].release) for v, copy in present.items() if program.values[v].release >= 0 and not left[v]]

    when = {p: i for i, (p, again) in enumerate(steps) if not again}
    for copy, position in ends:
        if position < n or copy[0] in repeats or program.values[copy[0]].release >= position:
            copy[2] = max(copy[2], when[position])
    lifetimes = [(first, last, program.values[v].bytes) for v, first, last in copies]
    lifetimes += [(when[f.born], when[f.dies], f.bytes) for f in program.fixed]
    scratch = [program.op_at(p).workspace_bytes for p, _ in steps]
    held = [sum(size for first, last, size in lifetimes if first <= i <= last) for i in range(len(steps))]
    return [program.resident_bytes + a + b for a, b in zip(held, scratch, strict=True)]


def test_launch_time_counts_for_each_recomputed_op() -> None:
    program = chain()
    forward = tuple(op._replace(launch_us=0.5) for op in program.forward)
    slower = Program(forward, program.backward, program.values, (), 0)
    assert simulate(slower, (1, 2)).recompute_us == 2.0 + 4.0 + 2 * 0.5


def test_scratch_memory_counts_each_time_the_op_runs() -> None:
    program = chain()
    forward = (program.forward[0], program.forward[1]._replace(workspace_bytes=50), program.forward[2])
    backward = (program.backward[0], program.backward[1], program.backward[2]._replace(workspace_bytes=7))
    busy = Program(forward, backward, program.values, (), 1000)
    assert [b for _, _, b in live(busy, (1,))] == [100, 250, 300, 200, 250, 200, 107]


def test_random_state_is_kept_until_the_op_runs_again() -> None:
    program = chain()
    forward = (program.forward[0], program.forward[1]._replace(state_bytes=10), program.forward[2])
    drawing = Program(forward, program.backward, program.values, (), 1000)
    assert [b for _, _, b in live(drawing, ())] == [100, 200, 300, 300, 200, 100]
    # kept from b on, and while b runs again the present state lies beside it
    assert [b for _, _, b in live(drawing, (1,))] == [100, 210, 310, 210, 220, 200, 100]


def test_fixed_storages_move_with_their_ops() -> None:
    program = chain()
    gradient = Fixed(3, 4, 40)
    output = Fixed(2, 5, 1)
    fixed = Program(program.forward, program.backward, program.values, (gradient, output), 1000)
    assert [b for _, _, b in live(fixed, (1,))] == [100, 200, 301, 241, 241, 241, 101]


def test_a_value_that_backward_never_reads_dies_in_forward() -> None:
    program = Program((Op("a", 1.0, 0, (), (0,)), Op("b", 1.0, 0, (0,), (1,))), (Op("b'", 1.0, 0),), (
        Value("a", 100, 0, 1), Value("b", 10, 1, 1, (2,), 2)), (), 0)  # fmt: skip
    assert [b for _, _, b in live(program, ())] == [100, 110, 10]
    # to recompute b, a has to be there: it is kept, as if saved
    assert [b for _, _, b in live(program, (1,))] == [100, 110, 110, 10]
    assert simulate(program, (1,)).saved_bytes == 100


def test_a_value_fused_into_its_readers_occupies_only_what_it_passes() -> None:
    values = (Value("a", 100, 0, 1, (2,), 2, passing_bytes=0), Value("b", 10, 1, 1, (2,), 2))
    program = Program((Op("a", 1.0, 0, (), (0,)), Op("b", 1.0, 0, (0,), (1,))), (Op("b'", 1.0, 0),), values, (), 0)
    assert [b for _, _, b in live(program, ())] == [100, 110, 110]
    assert [b for _, _, b in live(program, (0,))] == [0, 10, 10, 10]


def test_a_result_is_written_over_what_its_op_is_the_last_to_read() -> None:
    program = chain()
    values = tuple(value._replace(over=(v - 1,) if v else ()) for v, value in enumerate(program.values))
    program = dataclasses.replace(program, values=values, fixed=(Fixed(4, 5, 100, over=(1,)),))
    assert [b for _, _, b in live(program, ())] == [100, 200, 300, 300, 200, 200]  # the gradient of b lies where b did
    assert [b for _, _, b in live(program, (0,))] == [100, 100, 200, 200, 100, 200, 200]  # b lies where a did
    assert [b for _, _, b in live(program, (1,))] == [100, 200, 200, 200, 200, 300, 200]  # c where b did; the other b stays


@pytest.mark.parametrize(("passing", "expected"), [(0, [100, 100, 100, 100, 100]), (None, [100, 200, 200, 300, 100])])
def test_what_is_recomputed_and_stored_reads_beside(passing: int | None, expected: list[int]) -> None:
    values = (Value("a", 100, 0, 1, (2,), 2), Value("b", 100, 1, 1, (2,), 2, passing_bytes=passing))
    forward = (Op("a", 1.0, 0, (), (0,)), Op("b", 1.0, 0, (0,), (1,)))
    program = Program(forward, (Op("b'", 1.0, 0), Op("end", 0.0, 0)), values, (Fixed(2, 3, 100, over=(0,)),), 0)
    assert [b for _, _, b in live(program, (1,))] == expected


def test_the_peak_is_named() -> None:
    moment = simulate(chain(), ()).peak_at
    assert (moment.phase, moment.name, moment.live_bytes) == ("forward", "c", 1300)


def naive_peak(program: Program, dropped: frozenset[int]) -> tuple[int, int, float]:
    """(peak, saved bytes, recompute time) by running the step with a set of live values, one op after another."""
    n = len(program.forward)
    producer = {v: p for p, op in enumerate(program.forward) for v in op.outputs}
    script: list[tuple[str, int]] = [("forward", p) for p in range(n)]
    made: set[int] = set()

    def make(op: int) -> None:
        if op in made or op not in dropped:
            return
        for v in program.forward[op].inputs:
            make(producer[v])
        made.add(op)
        script.append(("again", op))

    for b in range(len(program.backward)):
        for v, value in enumerate(program.values):
            if n + b in value.reads:
                make(producer[v])
        script.append(("backward", n + b))

    def uses(v: int, step: tuple[str, int]) -> bool:
        phase, p = step
        value = program.values[v]
        if phase == "forward":
            return value.op <= p <= value.last_forward
        if phase == "again":
            return v in program.forward[p].inputs or v in program.forward[p].outputs
        return value.release >= p

    peak, saved, live_now = program.resident_bytes, set(), set()
    for at, step in enumerate(script):
        phase, p = step
        if phase != "backward":
            live_now |= set(program.forward[p].outputs)
        if phase == "backward" or phase == "again":
            saved |= {v for v in live_now if producer[v] not in made}
        extra = program.forward[p].workspace_bytes if p < n else program.backward[p - n].workspace_bytes
        here = sum(program.values[v].bytes for v in live_now) + extra + program.resident_bytes
        running = p if phase != "again" else next(q for f, q in script[at:] if f == "backward")
        here += sum(f.bytes for f in program.fixed if _alive(f, phase, running, p))
        peak = max(peak, here)
        rest = script[at + 1 :]
        dropped_now = {v for v in live_now if producer[v] in dropped and phase == "forward"}
        live_now = {v for v in live_now if any(uses(v, s) for s in (rest if v not in dropped_now else _until_backward(rest)))}
    return (
        peak,
        sum(program.values[v].bytes for v in saved),
        sum(program.forward[p].cost_us + program.forward[p].launch_us for p in made),
    )


def _until_backward(rest: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [step for step in rest if step[0] == "forward"]


def _alive(fixed: Fixed, phase: str, running: int, position: int) -> bool:
    """A recompute runs between two backward ops: what is there both before and after it is alive."""
    if phase != "again":
        return fixed.born <= position <= fixed.dies
    return fixed.born < running <= fixed.dies


def fused_middle() -> Program:
    """a → b → c, where b is computed inside its readers c and b'."""
    forward = (
        Op("a", 1.0, 0, (), (0,)),
        Op("b", 0.0, 0, (0,), (1,)),
        Op("other", 1.0, 0),
        Op("c", 4.0, 0, (1,), (2,)),
    )
    backward = (Op("c'", 1.0, 0), Op("b'", 1.0, 0))
    values = (
        Value("a", 100, 0, 1),
        Value("b", 30, 1, 3, (4, 5), 5, passing_bytes=0),
        Value("c", 10, 3, 3, (4,), 4),
    )
    return Program(forward, backward, values, (), resident_bytes=0)


def test_what_a_fused_value_reads_is_held_for_its_readers() -> None:
    assert live(fused_middle(), (1,)) == [
        ("forward", "a", 100),
        ("forward", "b", 100),
        ("forward", "other", 100),
        ("forward", "c", 110),
        ("recompute", "b", 110),
        ("backward", "c'", 110),
        ("backward", "b'", 100),
    ]


def test_a_fused_value_that_is_saved_is_stored() -> None:
    assert [moment[2] for moment in live(fused_middle(), ())] == [100, 130, 30, 40, 40, 30]


@settings(max_examples=300, deadline=None)
@given(program=programs(), data=st.data())
def test_it_agrees_with_a_naive_replay(program: Program, data: st.DataObject) -> None:
    free = [p for p, op in enumerate(program.forward) if op.outputs]
    dropped = frozenset(data.draw(st.sets(st.sampled_from(free)))) if free else frozenset()
    replay = simulate(program, dropped)
    peak, saved, recompute_us = naive_peak(program, dropped)
    assert replay.peak_bytes == peak
    assert replay.saved_bytes == saved
    assert replay.recompute_us == pytest.approx(recompute_us)
    assert replay.peak_bytes == replay.peak_at.live_bytes
