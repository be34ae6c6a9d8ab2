"""What the recorder writes down of a step: the memory that is allocated, and the ops that run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from remat.workspace import Call


@dataclass
class Storage:
    """Memory from position `born` to `dies` (-1: to the end), made by forward op `node` if it is a decision's to keep.

    `last_forward` is the last forward op that reads it; autograd has `packed` it so many times, of which it has `released` some
    by now, unpacks it at the positions in `reads` and holds it until `release`. `kind` is one of `remat.program.KINDS`, ""
    where its lifetime tells. An autograd function that was given or made it (`in_function`) may hold it too.
    """

    bytes: int
    born: int
    dies: int = -1
    node: fx.Node | None = None
    last_forward: int = -1
    packed: int = 0
    released: int = 0
    reads: list[int] = field(default_factory=list)
    release: int = -1
    kind: str = ""
    in_function: bool = False


class Ran(NamedTuple):
    """A forward op that ran: the storages behind its results, and those that running it again would read. `inside` are the ops
    of an autograd function, each with the bytes that live beside its scratch memory and are no result of the function's."""

    node: fx.Node
    cost_us: float
    call: Call | None
    storages: tuple[Storage, ...]
    reads: tuple[Storage, ...]
    inside: tuple[tuple[Call | None, int], ...] = ()


class Kernel(NamedTuple):
    """A backward op: `origin` is the position of the forward op whose gradient it computes."""

    name: str
    cost_us: float
    call: Call | None
    origin: int
