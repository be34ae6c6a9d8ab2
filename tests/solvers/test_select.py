"""The dynamic program against every way through the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remat.solvers.select import Choice, select

Choices = Mapping[tuple[int, int], Sequence[Choice]]


@st.composite
def choices(draw: st.DrawFn) -> tuple[dict[tuple[int, int], list[Choice]], int]:
    n = draw(st.integers(1, 4))
    table = {}
    for i in range(n):
        for j in range(i + 1, min(i + 2, n) + 1):
            size = draw(st.integers(1, 3)) if j == i + 1 else draw(st.integers(0, 2))
            table[i, j] = [
                Choice(
                    draw(st.integers(0, 9)),
                    draw(st.integers(0, 12)),
                    draw(st.integers(0, 12)),
                    float(draw(st.integers(0, 9))),
                    k,
                )
                for k in range(size)
            ]
    return table, n


def ways(table: Choices, n: int, start: int = 0) -> Iterator[list[tuple[int, int, int]]]:
    """Every way from block `start` to the end."""
    if start == n:
        yield []
        return
    for (i, j), menu in table.items():
        if i == start:
            for choice in menu:
                for rest in ways(table, n, j):
                    yield [(i, j, choice.index), *rest]


def price(table: Choices, way: list[tuple[int, int, int]]) -> tuple[int, float]:
    """(peak, time) of a way: each block runs on top of what was saved before it."""
    saved = peak = 0
    time = 0.0
    for i, j, k in way:
        choice = table[i, j][k]
        peak = max(peak, saved + choice.forward_bytes, saved + choice.backward_bytes)
        saved += choice.saved_bytes
        time += choice.recompute_us
    return peak, time


@settings(max_examples=200, deadline=None)
@given(problem=choices(), budget=st.integers(0, 40))
def test_select_finds_the_fastest_way_that_fits(problem: tuple[dict[tuple[int, int], list[Choice]], int], budget: int) -> None:
    table, n = problem
    fitting = [way for way in ways(table, n) if price(table, way)[0] <= budget]
    found = select(table, n, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert price(table, found)[0] <= budget
    assert price(table, found)[1] == pytest.approx(min(price(table, way)[1] for way in fitting))


def test_a_merged_stretch_is_taken_when_only_that_fits() -> None:
    table = {
        (0, 1): [Choice(10, 10, 10, 1.0, 0)],
        (1, 2): [Choice(10, 10, 10, 1.0, 0)],
        (0, 2): [Choice(5, 10, 15, 5.0, 0)],
    }
    assert select(table, 2, 20) == [(0, 1, 0), (1, 2, 0)]
    assert select(table, 2, 15) == [(0, 2, 0)]
    assert select(table, 2, 14) is None


def test_hundreds_of_states_are_thinned_and_still_fit() -> None:
    table = {(i, i + 1): [Choice(k, 60, 60 + k, (60 - k) ** 1.5, k) for k in range(60)] for i in range(12)}
    way = select(table, 12, 400)
    assert way is not None
    assert price(table, way)[0] <= 400
