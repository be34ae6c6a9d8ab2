"""Using the room that a plan leaves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from remat.program import Program
from remat.simulate import simulate
from remat.solvers.improve import improve, prune
from tests.programs import programs, stack


@settings(max_examples=200, deadline=None)
@given(program=programs(most_ops=8), data=st.data())
def test_improve_never_leaves_the_budget_nor_takes_longer(program: Program, data: st.DataObject) -> None:
    dropped = frozenset(data.draw(st.sets(st.integers(0, len(program.forward) - 1))))
    before = simulate(program, dropped)
    budget = before.peak_bytes + data.draw(st.integers(0, 30))
    better = improve(program, dropped, budget)
    after = simulate(program, better)
    assert better <= dropped
    assert after.peak_bytes <= budget
    assert after.recompute_us <= before.recompute_us


def test_with_enough_room_nothing_is_recomputed() -> None:
    program = stack()
    everything = frozenset(range(len(program.forward)))
    assert improve(program, everything, simulate(program, ()).peak_bytes) == frozenset()


def test_room_for_some_is_used() -> None:
    program = stack()
    dropped = frozenset(p for p in range(len(program.forward)) if p % 3 != 2)
    tight = simulate(program, dropped)
    better = improve(program, dropped, tight.peak_bytes + 150)
    assert simulate(program, better).recompute_us < tight.recompute_us


@settings(max_examples=200, deadline=None)
@given(program=programs(most_ops=8), data=st.data())
def test_pruning_changes_no_recompute(program: Program, data: st.DataObject) -> None:
    dropped = frozenset(data.draw(st.sets(st.integers(0, len(program.forward) - 1))))
    pruned = prune(program, dropped)
    assert pruned <= dropped
    before, after = simulate(program, dropped), simulate(program, pruned)
    assert sorted(before.recomputed) == sorted(after.recomputed) == sorted(pruned)
    assert before.peak_bytes == after.peak_bytes
