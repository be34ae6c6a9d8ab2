"""Which kernels may be one, on made-up schedules whose bytes are worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from remat import inductor_fusion
from remat.inductor_fusion import LocalFusion


class Kernel:
    """A node of the schedule, with one result of so many bytes."""

    def __init__(self, name: str, order: int, size: int, reads: Sequence[Kernel]) -> None:
        self.name, self.min_order, self.max_order = name, order, order
        self.ancestors = {read.name for read in reads}.union(*(read.ancestors for read in reads))
        self.read_writes = SimpleNamespace(reads=[SimpleNamespace(name=read.name) for read in reads])
        self.node = SimpleNamespace(get_origins=lambda: [self], size=size)
        self.result = SimpleNamespace(node=self.node, users=[], get_name=lambda: name)
        for read in reads:
            read.result.users.append(SimpleNamespace(node=self))

    def get_name(self) -> str:
        return self.name

    def get_nodes(self) -> list[Kernel]:
        return [self]

    def get_outputs(self) -> list[Any]:
        return [self.result]


class Fused:
    """Several as one."""

    def __init__(self, *members: Kernel) -> None:
        self.members = members
        self.min_order, self.max_order = members[0].min_order, members[-1].max_order
        self.ancestors = set[str]().union(*(member.ancestors for member in members)) - {member.name for member in members}

    def get_nodes(self) -> list[Kernel]:
        return list(self.members)


@pytest.fixture(autouse=True)
def _backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_fusion, "V", SimpleNamespace(graph=SimpleNamespace(is_backward=True)))
    monkeypatch.setattr(inductor_fusion._torch, "buffer_bytes", lambda node: node.size)
    monkeypatch.setattr(inductor_fusion._torch.InductorChoices, "can_fuse_horizontal", staticmethod(lambda *_: True))
    monkeypatch.setattr(inductor_fusion, "_is_concatenation", lambda _: False)


def kernels(sizes: Mapping[str, int], reads: Mapping[str, Sequence[str]]) -> tuple[Any, dict[str, Kernel]]:
    """A schedule in the order of `sizes`."""
    made: dict[str, Kernel] = {}
    for order, (name, size) in enumerate(sizes.items()):
        made[name] = Kernel(name, order, size, [made[read] for read in reads.get(name, ())])
    buffers = {name: kernel.result for name, kernel in made.items()}
    return SimpleNamespace(name_to_node=made, name_to_buf=buffers, name_to_donated_buffer={}, buffer_names_to_free=set()), made


def again() -> tuple[Any, dict[str, Kernel]]:
    """A recomputed value that a product reads, and a gradient that is computed from the same later."""
    sizes = {"input": 10, "value": 100, "product": 5, "tangent": 20, "total": 1, "gradient": 100, "end": 5}
    reads = {
        "value": ("input",),
        "product": ("value",),
        "tangent": ("input",),
        "total": ("input", "tangent"),
        "gradient": ("total", "tangent"),
        "end": ("gradient",),
    }
    return kernels(sizes, reads)


@pytest.mark.parametrize(("tight", "may"), [("", True), ("total", False), ("tangent", False), ("end", True)])
def test_what_is_held_for_a_kernel_needs_room_until_that_has_run(tight: str, may: bool) -> None:
    """The value and what its product holds wait for `total`."""
    scheduler, made = again()
    fusion = LocalFusion({name: 99 if name == tight else 1000 for name in made})
    assert fusion.can_fuse_horizontal(scheduler, made["value"], made["total"], 1) is may


@pytest.mark.parametrize(("room", "may"), [(1000, True), (99, False)])
def test_a_horizontal_fusion_grows_only_where_there_is_room(room: int, may: bool) -> None:
    scheduler, made = again()
    fusion = LocalFusion({name: room if name == "gradient" else 1000 for name in made})
    assert fusion.can_fuse_vertical(scheduler, Fused(made["value"], made["total"]), made["gradient"], 1) is may
    assert fusion.can_fuse_vertical(scheduler, made["total"], made["gradient"], 1)


@pytest.mark.parametrize(("room", "is_full"), [(110, False), (109, True)])
def test_what_nothing_reads_any_more_is_let_go_of_where_there_is_no_room_for_it(room: int, is_full: bool) -> None:
    scheduler, made = again()
    scheduler.buffer_names_to_free = {"input", "value", "an input of the graph"}
    fusion = LocalFusion({"gradient": room})
    assert fusion.is_full(scheduler, made["gradient"]) is is_full
    assert not fusion.is_full(scheduler, made["end"])  # the plan knows nothing of it
    assert not LocalFusion().is_full(scheduler, made["gradient"])
