"""The minimum cut against every choice there is."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from remat.solvers.mincut import Items, Network, closure, hull, totals


@st.composite
def items(draw: st.DrawFn) -> Items:
    n = draw(st.integers(1, 7))
    return Items(
        bytes=[draw(st.integers(1, 50)) for _ in range(n)],
        cost_us=[float(draw(st.integers(1, 20))) for _ in range(n)],
        inputs=[sorted(draw(st.sets(st.integers(0, v - 1), max_size=3))) if v else [] for v in range(n)],
        needed=[draw(st.booleans()) for _ in range(n)],
        banned=[draw(st.integers(0, 4)) == 0 for _ in range(n)],
    )


def everything(choice: Items) -> list[frozenset[int]]:
    """All sets of items that may be recomputed."""
    free = [v for v, banned in enumerate(choice.banned) if not banned]
    return [frozenset(c) for k in range(len(free) + 1) for c in itertools.combinations(free, k)]


def cost(choice: Items, recomputed: frozenset[int], price: float) -> float:
    saved_bytes, recompute_us = totals(choice, recomputed)
    return price * saved_bytes + recompute_us


@settings(max_examples=150, deadline=None)
@given(choice=items(), price=st.sampled_from([0.01, 0.1, 0.3, 1.0, 3.0, 100.0]))
def test_cheapest_is_the_minimum_over_all_choices(choice: Items, price: float) -> None:
    found = Network(choice).cheapest(price)
    assert not any(choice.banned[v] for v in found)
    least = min(cost(choice, other, price) for other in everything(choice))
    assert cost(choice, found, price) <= least * (1 + 1e-5) + 1e-5


@settings(max_examples=60, deadline=None)
@given(choice=items())
def test_the_hull_runs_from_save_all_to_save_least(choice: Items) -> None:
    corners = hull(choice)
    points = [totals(choice, corner) for corner in corners]
    assert points == sorted(points, key=lambda p: (-p[0], p[1]))
    saved = [bytes_ for bytes_, _ in points]
    spent = [us for _, us in points]
    assert spent == sorted(spent)
    assert saved[0] == totals(choice, frozenset())[0]
    assert saved[-1] == min(totals(choice, other)[0] for other in everything(choice))


@settings(max_examples=60, deadline=None)
@given(choice=items(), price=st.sampled_from([0.05, 0.2, 0.7, 2.0]))
def test_every_price_is_answered_by_a_corner(choice: Items, price: float) -> None:
    least = min(cost(choice, other, price) for other in everything(choice))
    assert min(cost(choice, corner, price) for corner in hull(choice)) <= least * (1 + 1e-5) + 1e-5


def test_closure_keeps_what_recompute_starts_from() -> None:
    chain = Items([10, 10, 10], [1.0, 1.0, 1.0], [[], [0], [1]], [False, False, True], [False, False, False])
    assert closure(chain, frozenset({2})) == (frozenset({2}), frozenset({1}))
    assert closure(chain, frozenset({1, 2})) == (frozenset({1, 2}), frozenset({0}))
    assert closure(chain, frozenset({0, 1})) == (frozenset(), frozenset({2}))
    assert totals(chain, frozenset({1, 2})) == (10, 2.0)


def test_a_price_of_nothing_saves_and_a_high_price_recomputes() -> None:
    chain = Items([10, 10], [1.0, 1.0], [[], [0]], [True, True], [False, False])
    assert closure(chain, Network(chain).cheapest(0.0))[0] == frozenset()
    assert closure(chain, Network(chain).cheapest(1e6))[1] == frozenset()


def test_a_banned_item_is_saved_at_any_price() -> None:
    chain = Items([10, 10], [1.0, 1.0], [[], [0]], [False, True], [True, False])
    assert Network(chain).cheapest(1e6) <= {1}
    assert closure(chain, frozenset({1})) == (frozenset({1}), frozenset({0}))
