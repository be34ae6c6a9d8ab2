"""Where in the user's model a node comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import fx

_ENTRY = re.compile(r"__dict__\['_modules'\]\['(\w+)'\]")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node came from, "" when unknown."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    return _ENTRY.sub(r"\1", path).removeprefix("L['self'].").removeprefix("L['self']")


def source_line(node: fx.Node) -> str:
    """`file:line` of the user's code that the node came from, "" when unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def common_module(nodes: Sequence[fx.Node]) -> str:
    """The path of the innermost module around all nodes, or those of the first and the last of them."""
    paths = [path.split(".") for path in map(module_path, nodes) if path]
    if not paths:
        return ""
    shortest = min(paths, key=len)
    depth = next((i for i in range(len(shortest)) if any(p[i] != shortest[i] for p in paths)), len(shortest))
    common = ".".join(shortest[:depth])
    return common or f"{'.'.join(paths[0])} … {'.'.join(paths[-1])}"
