"""Threads that call one model: a capture of it runs alone, since tracing puts other tensors in the place of its parameters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Calls pass at once, and may lead to further ones; a capture waits until none is under way, and they for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._captures = False

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._captures)
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._captures and not self._calls)
            self._captures = True
        try:
            yield
        finally:
            with self._changed:
                self._captures = False
                self._changed.notify_all()
