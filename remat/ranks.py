"""What the ranks of a run tell each other of their plans, so that a fault on one is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from remat.budget import format_bytes
from remat.errors import BudgetError, RematError
from remat.plan import Input, Plan


class Word(NamedTuple):
    """What a rank says of its own plan: `error` in the place of one."""

    error: RematError | None
    fingerprint: str = ""
    model: str = ""
    inputs: tuple[Input, ...] = ()
    resident_bytes: int = 0


def agreed(make: Callable[[], Plan], group: dist.ProcessGroup | None) -> tuple[Plan, list[Word]]:
    """Make a plan on every rank of `group`; returns this rank's and what each says of its own.

    Raises the error of one rank on all of them, and RematError where they have planned for different graphs.
    """
    cause: Exception | None = None
    try:
        mine = make()
        word = Word(None, mine.fingerprint, mine.model, mine.inputs, mine.resident_bytes)
    except Exception as error:  # of any kind: the other ranks wait for a word
        word, cause = Word(_portable(error)), error
    words: list[Word] = [word] * dist.get_world_size(group)
    dist.all_gather_object(words, word, group=group)
    try:
        _check(words)
    except RematError as error:
        raise error from cause
    return mine, words


def _portable(error: Exception) -> RematError:
    """The same error without what it came from, which may not travel between processes; others' errors as ours."""
    if isinstance(error, BudgetError):
        about = {"budget_bytes": error.budget_bytes, "minimum_bytes": error.minimum_bytes}
        return type(error)(str(error), **about, where=error.where)
    return type(error)(str(error)) if isinstance(error, RematError) else RematError(f"{type(error).__name__}: {error}")


def _check(words: list[Word]) -> None:
    for rank, word in enumerate(words):
        if word.error is not None:
            word.error.args = (f"on rank {rank}: {word.error}",)
            raise word.error
    first = words[0]
    for rank, word in enumerate(words):
        if word.fingerprint != first.fingerprint:
            raise RematError(f"ranks 0 and {rank} differ: {_shown(first)} on rank 0, {_shown(word)} on rank {rank}")


def _shown(word: Word) -> str:
    inputs = ", ".join(f"{i.name} {'x'.join(map(str, i.shape))} {i.dtype}" for i in word.inputs)
    return f"{word.model}({inputs}), graph {word.fingerprint}, {format_bytes(word.resident_bytes)} resident"
