"""Which kernels Inductor may fuse behind door 2.

Two kernels that share what they read save traffic as one. But one of them then runs later, or earlier, than where the plan
has it: a recomputed activation, say, together with the gradient that is computed from the same, though the product that reads
it could have let go of it before.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from remat import _torch
from remat._torch import V

_REACH = 10  # kernels
_NODES = 32  # of the graph, about as many kernels


def can_wait(product: fx.Node, total: fx.Node) -> bool:
    """Whether a matrix product may be computed with a sum that it is a term of. The gradient of an embedding that is also the
    output head is such a sum, at the end of backward: until then what the product reads would be held, and that is as large as
    the logits."""
    node = product
    for _ in range(_NODES):
        node = node.next
        if node is total:
            return True
    return False


class LocalFusion(_torch.InductorChoices):
    """Inductor's fusion choices, without fusion of kernels that are far apart in running order, and in backward without
    horizontal fusion that there is no room for.

    Of those far apart, horizontal ones share a read of some small table, vertical ones the result of a recomputed chain; either
    pulls the recompute of many layers to one moment, where all of it is held (`Scheduler.are_long_distant_nodes` says as much
    of its own threshold, which is more than a layer).

    room: bytes between what the plan holds and the budget while each node of backward runs; a node that is not in it has any.
    """

    def __init__(self, room: Mapping[str, int] | None = None) -> None:
        self.room = {} if room is None else room
        self._of, self._in_order = None, list[float]()

    def uuid(self) -> str:
        return f"remat.LocalFusion.6.{_REACH}"  # what room says is with the partition (`remat.inductor`)

    def can_fuse_horizontal(self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:  # type: ignore[override]
        distance = max(abs(node1.min_order - node2.max_order), abs(node2.min_order - node1.max_order))
        if distance > _REACH:
            return False
        if not _torch.InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score):
            return False
        return self._has_room(scheduler, node1, node2)

    def can_fuse_vertical(self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:  # type: ignore[override]
        if node2.min_order - node1.max_order > _REACH:
            return False
        needed = all(member.get_name() in node2.ancestors for member in node1.get_nodes())
        return needed or self._has_room(scheduler, node1, node2)  # if not, a horizontal fusion grows

    def _has_room(self, scheduler: Any, node1: Any, node2: Any) -> bool:
        if not self.room or not V.graph.is_backward:
            return True
        members = sorted((*node1.get_nodes(), *node2.get_nodes()), key=lambda member: member.min_order)
        more = _more_bytes(scheduler, members, _moment(scheduler, members))
        return not more or more <= min(self._rooms(scheduler)[members[0].min_order : members[-1].min_order + 1])

    def is_full(self, scheduler: Any, node: Any) -> bool:
        """Whether there is no room, while a scheduler's node runs, for what kernels before it were the last to read, and still
        hold."""
        if not self.room or not V.graph.is_backward:
            return False
        buffers = ChainMap(scheduler.name_to_buf, scheduler.name_to_donated_buffer)
        waiting = [buffers[name].node for name in scheduler.buffer_names_to_free if name in buffers]
        return sum(map(_torch.buffer_bytes, waiting)) > min(self._room(member) for member in node.get_nodes())

    def _rooms(self, scheduler: Any) -> list[float]:
        """The room while each node runs, in running order."""
        if self._of is not scheduler:
            self._of, nodes = scheduler, [node for node in scheduler.name_to_node.values() if hasattr(node, "min_order")]
            self._in_order = [float("inf")] * (max(node.min_order for node in nodes) + 1)  # one that is not used has no place
            for node in nodes:
                self._in_order[node.min_order] = self._room(node)
        return self._in_order

    def _room(self, member: Any) -> float:
        wholes = (reader for made in member.get_outputs() for reader in _readers(made) if _is_concatenation(reader))
        names = [origin.name for stored in (member, *wholes) for origin in stored.node.get_origins()]
        return min((self.room[name] for name in names if name in self.room), default=float("inf"))


class SparingFusion(LocalFusion):
    """And without any horizontal fusion."""

    def uuid(self) -> str:
        return f"{super().uuid()}.sparing"

    def can_fuse_horizontal(self, *_: Any) -> bool:  # type: ignore[override]
        return False


def _moment(scheduler: Any, members: Sequence[Any]) -> Any:
    """The member in whose place all of them can run: the last that needs something which runs after the first."""
    own = {member.get_name() for member in members}
    first = members[0]
    for member in reversed(members):
        if any(scheduler.name_to_node[name].min_order > first.min_order for name in member.ancestors - own):
            return member
    return first


def _more_bytes(scheduler: Any, members: Sequence[Any], at: Any) -> int:
    """What is there when they run in one place beyond what was planned for it: results of those that would run later, and what
    would be gone, if the others, and what is computed from them, did not wait."""
    buffers = ChainMap(scheduler.name_to_buf, scheduler.name_to_donated_buffer)
    more = {buffer.get_name(): buffer for m in members if m.min_order > at.min_order for buffer in m.get_outputs()}
    waiting = [member for member in members if member.min_order < at.min_order]
    seen = {member.get_name() for member in members}
    while waiting:
        node = waiting.pop()
        held = [buffers[dep.name] for dep in node.read_writes.reads if dep.name in buffers]
        for buffer in node.get_outputs():
            readers = [reader for reader in _readers(buffer) if reader.get_name() not in seen]
            late = [reader for reader in readers if reader.min_order < at.min_order]
            seen.update(reader.get_name() for reader in late)
            waiting += late
            held += [buffer] if node in members and readers else []
        more.update((buffer.get_name(), buffer) for buffer in held if _last(buffer) < at.min_order)
    return sum(_torch.buffer_bytes(buffer.node) for buffer in more.values())


def _readers(buffer: Any) -> Iterator[Any]:
    return (user.node for user in buffer.users if hasattr(user.node, "min_order"))  # the graph's output has none


def _is_concatenation(reader: Any) -> bool:
    """True for what is stored together with the first of its pieces that is."""
    return isinstance(reader.node, _torch.inductor_ir.ConcatKernel)


def _last(buffer: Any) -> float:
    """Where a buffer is last read."""
    if len(readers := list(_readers(buffer))) < len(buffer.users):
        return float("inf")
    return max((reader.max_order for reader in readers), default=-1.0)
