"""Searching value by value."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remat.planner import joined
from remat.program import Decision, Op, Program, Value
from remat.simulate import simulate
from remat.solvers.moves import Found
from remat.solvers.search import meant, search, shrunk
from tests.programs import programs, stack


def best_us(program: Program, budget_bytes: int) -> float:
    """The least recompute time of any set of dropped ops that fits."""
    ops = range(len(program.forward))
    sets = itertools.chain.from_iterable(itertools.combinations(ops, n) for n in range(len(ops) + 1))
    replays = (simulate(program, frozenset(dropped)) for dropped in sets)
    return min(replay.recompute_us for replay in replays if replay.peak_bytes <= budget_bytes)


@settings(max_examples=150, deadline=None)
@given(program=programs(most_ops=7), data=st.data())
def test_what_is_found_fits_and_takes_no_longer(program: Program, data: st.DataObject) -> None:
    dropped = frozenset(data.draw(st.sets(st.integers(0, len(program.forward) - 1))))
    before = simulate(program, dropped)
    budget = before.peak_bytes + data.draw(st.integers(0, 20))
    found = search(program, dropped, budget)
    after = simulate(program, found.dropped, repeats=found.repeats)
    assert after.live_bytes == found.replay.live_bytes
    assert after.peak_bytes <= budget
    assert after.recompute_us <= before.recompute_us
    assert shrunk(program, dropped).replay.peak_bytes <= before.peak_bytes


def test_few_blocks_are_solved_as_well_as_by_trying_everything() -> None:
    program = stack(blocks=3)
    everything = frozenset(range(len(program.forward)))
    top, bottom = simulate(program, ()).peak_bytes, simulate(program, everything).peak_bytes
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = int(bottom + share * (top - bottom))
        assert search(program, everything, budget).replay.recompute_us == best_us(program, budget)


def test_the_same_decisions_are_replayed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[frozenset[int], frozenset[tuple[int, int]]]] = []

    def noted(program: Program, dropped: frozenset[int], repeats: Mapping[int, int], regions: Any) -> Found:
        asked.append((dropped, frozenset(repeats.items())))
        return meant(program, dropped, repeats, regions)

    monkeypatch.setattr("remat.solvers.search.meant", noted)
    program = stack(blocks=3)
    everything = frozenset(range(len(program.forward)))
    search(program, everything, (simulate(program, ()).peak_bytes + simulate(program, everything).peak_bytes) // 2)
    assert len(asked) == len(set(asked)) > 5


def test_a_value_kept_only_to_recompute_another_goes_with_it() -> None:
    """Backward reads b, which is computed from a. Dropping b alone frees nothing: a would be kept in its place."""
    values = (Value("a", 100, 0, 1), Value("b", 100, 1, 2, (4,), 4), Value("c", 60, 2, 2, (3,), 3))
    ops = (Op("a", 1.0, 0, (), (0,)), Op("b", 1.0, 0, (0,), (1,)), Op("c", 50.0, 0, (1,), (2,)))
    program = Program(ops, (Op("back c", 1.0, 90), Op("back b", 1.0, 0)), values, (), 0)
    assert simulate(program, {1}).peak_bytes >= simulate(program, ()).peak_bytes
    assert search(program, frozenset({0, 1, 2}), 210).dropped == {0, 1}


def test_pins_stay() -> None:
    program = stack(blocks=3)
    pinned = {1: Decision.RECOMPUTE, 4: Decision.SAVE}
    forward = tuple(op._replace(pin=pinned.get(p)) for p, op in enumerate(program.forward))
    program = dataclasses.replace(program, forward=forward)
    everything = frozenset(range(len(forward))) - {4}
    for budget in (simulate(program, everything).peak_bytes, simulate(program, ()).peak_bytes):
        found = search(program, everything, budget).decided
        assert 1 in found
        assert 4 not in found


def test_where_nothing_fits_otherwise_values_are_let_go_of_and_made_again() -> None:
    """Backward reads a first and last, and needs all the memory in between."""
    ops = (Op("a", 5.0, 0, (), (0,)), Op("b", 1.0, 0, (0,), (1,)))
    values = (Value("a", 100, 0, 1, (2, 4), 4), Value("b", 10, 1, 1, (2, 3), 3))
    program = Program(ops, (Op("b'", 1.0, 0), Op("all", 1.0, 100), Op("a'", 1.0, 0)), values, (), 0)
    assert min(simulate(program, dropped).peak_bytes for dropped in [(), (0,), (1,), (0, 1)]) == 210
    found = shrunk(program, frozenset())
    assert (found.dropped, found.repeats, found.replay.peak_bytes) == (set(), {0: 1}, 110)
    in_graph = shrunk(dataclasses.replace(program, saved_stay=True), frozenset())
    assert (in_graph.dropped, in_graph.repeats, in_graph.replay.peak_bytes) == ({0}, {0: 1}, 110)
    assert search(program, frozenset({0}), 110, repeats={0: 1}).repeats == {0: 1}
    pinned = dataclasses.replace(program, values=(values[0]._replace(pinned="held"), values[1]))
    assert not shrunk(pinned, frozenset()).repeats


def test_it_finds_the_same_each_time() -> None:
    program = stack(blocks=4)
    everything = frozenset(range(len(program.forward)))
    budget = simulate(program, everything).peak_bytes + 130
    first, second = search(program, everything, budget), search(program, everything, budget)
    assert (first.dropped, first.repeats) == (second.dropped, second.repeats)


def test_regions_that_share_a_dropped_value_run_as_one() -> None:
    program = stack(blocks=3)  # ops 0 1 2 | 3 4 5 | 6 7 8; op 2 is read by op 3
    spans = ((0, 3), (3, 6), (6, 9))
    assert joined(program, frozenset({0, 1}), spans) == spans
    assert joined(program, frozenset({2}), spans) == ((0, 6), (6, 9))
    assert joined(program, frozenset({2, 5}), spans) == ((0, 9),)
