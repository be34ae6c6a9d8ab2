"""Threads that call one model: a capture of it runs alone, since tracing puts other tensors in the place of its parameters."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from remat.errors import RewriteError

_PATIENCE_S = 600.0  # a capture with its plan takes minutes at most


class Gate:
    """Calls pass at once; a capture waits until no other thread's call is under way, and they for it. What one thread does
    within its own calls and captures waits for none of them: a loss may call the model, and a call may train it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = Counter[int]()  # by thread
        self._capturing: int | None = None

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._changed:
            self._wait_for(lambda: self._capturing in (None, thread))
            self._calls[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= Counter((thread,))
                self._changed.notify_all()

    def _wait_for(self, is_free: Callable[[], bool]) -> None:
        if not self._changed.wait_for(is_free, _PATIENCE_S):
            raise RewriteError(
                f"another thread's call or capture of this model has not ended in {_PATIENCE_S:.0f} s, and this thread waits "
                "for it; let no call of a model wait for what another thread does with it"
            )

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._changed:
            self._wait_for(lambda: self._capturing in (None, thread) and self._calls.keys() <= {thread})
            before, self._capturing = self._capturing, thread
        try:
            yield
        finally:
            with self._changed:
                self._capturing = before
                self._changed.notify_all()
