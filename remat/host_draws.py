"""Random numbers of Python's and NumPy's own generators, which a captured graph would have as constants."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

from remat.kept import reached
from remat.patches import here

_DRAWS: tuple[tuple[Any, Any], ...] = ((random, random.random), (np.random, np.random.rand))
_STATES = {"getstate", "setstate", "get_state", "set_state"}


@contextlib.contextmanager
def noting_host_draws(model: nn.Module) -> Iterator[list[str]]:
    """What it gives names, once the context has ended, the draws of this thread in it. Not all can be watched (a function that
    was imported by itself, a generator's own methods): the states tell of those, unless another thread was seen to draw."""
    drawn: list[str] = []
    elsewhere: list[str] = []

    def noting(name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def call_into(calls: list[str]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                return draw(*args, **kwargs)

            return call

        return here(call_into(drawn), call_into(elsewhere))

    before = _states()
    with contextlib.ExitStack() as stack:
        for module, one in _DRAWS:
            draws = {name: value for name, value in vars(module).items() if _is_like(one, value)}
            for name in draws.keys() - _STATES:
                stack.enter_context(mock.patch.object(module, name, noting(name, draws[name])))
        yield drawn
    if _states() != before and (not elsewhere or _holds_draws(model)):
        drawn.append("a function that is not watched")


def _is_like(draw: Any, function: Any) -> bool:
    """Whether both are of one generator."""
    return getattr(function, "__self__", None) is draw.__self__


def _holds_draws(model: nn.Module) -> bool:
    return any(_is_like(draw, item) for item in reached(model) for _, draw in _DRAWS)


def _states() -> Any:
    numpys: Any = np.random.get_state()  # noqa: NPY002  what a model draws from that calls np.random.rand()
    return random.getstate(), bytes(numpys[1]), numpys[2:]
