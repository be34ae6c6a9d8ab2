"""What can go wrong, as a tree.

RematError
├── BudgetError     no plan fits the budget, or the budget cannot be read (also a ValueError)
│   └── HostBudgetError   with more host memory one would
├── CaptureError    the model cannot be captured as one graph
└── RewriteError    a step used the rewritten graph in a way it cannot serve

A user's mistake raises one of these, with the rule, the number and the way out. A broken invariant is an `assert`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


Kind = TypeVar("Kind", bound=BaseException)


class RematError(Exception):
    """Base of everything remat raises on purpose."""


class BudgetError(RematError, ValueError):
    """A budget that cannot be read or cannot be met.

    Attributes:
        budget_bytes: the budget asked for, in bytes; None when it could not be read.
        minimum_bytes: the smallest budget that works, in bytes; None when unknown.
        where: the forward or backward op at which the smallest plan has its peak.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int | None = None,
        minimum_bytes: int | None = None,
        where: str | None = None,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.where = where


class HostBudgetError(BudgetError):
    """The host memory allowed is not enough. `budget_bytes` and `minimum_bytes` are of `host_budget=`, not of `budget=`."""


class CaptureError(RematError):
    """The model could not be captured as one graph; the message names the place and the way out."""


class RewriteError(RematError, RuntimeError):
    """A step asked something of the rewritten graph that would give a wrong number."""


def find_cause(error: BaseException | None, kind: type[Kind]) -> Kind | None:
    """The error of a kind that another one was raised for, or is; None where there is none."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def telling_of_gradients(adds: bool) -> Iterator[None]:
    """A `BudgetError` from within says that gradients are there already, if they are."""
    try:
        yield
    except BudgetError as error:
        if adds:
            error.args = (f"{error} Gradients are there already, to which this step adds.",)
        raise
