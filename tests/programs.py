"""Made-up steps for the solvers and the simulator: a Hypothesis strategy, and a stack of equal blocks."""

from __future__ import annotations

from hypothesis import strategies as st

from remat.program import Fixed, Op, Program, Value


@st.composite
def programs(draw: st.DrawFn, most_ops: int = 6, fixed: bool = True) -> Program:
    """One result per op; each op reads earlier results; backward reads and releases results in any order."""
    n = draw(st.integers(1, most_ops))
    m = draw(st.integers(1, most_ops))
    inputs = [tuple(sorted(draw(st.sets(st.integers(0, p - 1), max_size=2)))) if p else () for p in range(n)]
    ops = tuple(
        Op(f"f{p}", float(draw(st.integers(1, 9))), draw(st.integers(0, 5)), inputs[p], (p,), draw(st.sampled_from([0.0, 0.5])))
        for p in range(n)
    )
    values = []
    for p in range(n):
        reads = tuple(sorted(draw(st.sets(st.integers(n, n + m - 1), max_size=2))))
        release = draw(st.integers(reads[-1], n + m - 1)) if reads else -1
        last = max([p, *(q for q in range(n) if p in inputs[q])])
        values.append(Value(f"v{p}", draw(st.integers(1, 20)), p, last, reads, release))
    lifetimes = st.tuples(st.integers(0, n + m - 1), st.integers(0, n + m - 1), st.integers(1, 9))
    spans = draw(st.lists(lifetimes, max_size=3)) if fixed else []
    held = tuple(Fixed(min(a, b), max(a, b), size) for a, b, size in spans)
    backward = tuple(Op(f"b{p}", 1.0, draw(st.integers(0, 5))) for p in range(m))
    return Program(ops, backward, tuple(values), held, draw(st.integers(0, 10)))


def stack(blocks: int = 4, wide: int = 100, narrow: int = 10) -> Program:
    """Equal blocks narrow → wide → wide → narrow, backward in reverse; each op's backward reads its input and its result."""
    forward: list[Op] = []
    values: list[Value] = []
    sizes = [wide, wide, narrow] * blocks
    total = len(sizes)
    for p, size in enumerate(sizes):
        forward.append(Op(f"f{p}", 10.0 if size == wide else 4.0, 0, (p - 1,) if p else (), (p,)))
        own = 2 * total - 1 - p
        reads = tuple(sorted({own, own - 1})) if p + 1 < total else (own,)
        values.append(Value(f"v{p}", size, p, min(p + 1, total - 1), reads, own))
    backward = tuple(Op(f"b{p}", 20.0, 0) for p in range(total))
    return Program(tuple(forward), backward, tuple(values), (), 1000)
