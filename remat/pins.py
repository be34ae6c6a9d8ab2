"""Decisions that a person makes for some activations, whatever the policy decides for the others.

`{"layers.*.mlp::aten.mm.default": "SAVE"}`: left of `::` names of nested modules, which stand somewhere on the path of the
module that made the activation; right of it the op, as `explain` shows it; either may be empty. A key without `::` is the name
of an activation. `*` and `?` stand for any characters, but not for a dot between modules. Where several keys match, the last
one counts. A key without an op leaves alone what cannot be treated so, if anything can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from remat.errors import RematError
from remat.passes.provenance import module_path
from remat.program import Decision, Program

Pins: TypeAlias = "Mapping[str, Decision | str] | None"


def check_pins(pins: Pins) -> None:
    """Raises RematError unless `pins` is a mapping from names to decisions."""
    if pins is None:
        return
    if not isinstance(pins, Mapping):
        raise RematError(f"pin={pins!r} is not a mapping from names of activations to decisions")
    for pattern, decision in pins.items():
        read_decision(decision, f"pin: {pattern!r}")


def read_decision(decision: Any, what: str) -> Decision:
    """A decision, or its name in any case. Raises RematError for anything else, which `what` is for."""
    try:
        return Decision(decision.lower())
    except (AttributeError, ValueError):
        known = ", ".join(repr(d.name) for d in Decision)
        raise RematError(f"{what}: {decision!r} is no decision; there are {known}") from None


def pinned(program: Program, nodes: Sequence[fx.Node], pins: Pins) -> Program:
    """The program with the decisions of `pins`. `nodes[p]` is its forward op p.

    Raises RematError for a pattern that matches no activation, and for a decision that cannot be carried out.
    """
    if not pins:
        return program
    read = [any(program.values[v].reads for v in op.outputs) for op in program.forward]
    forward = list(program.forward)
    for pattern, wanted in pins.items():
        if not isinstance(pattern, str):
            raise RematError(f"pin={pattern!r} is no string; write 'modules::op', or a name that explain shows")
        decision = read_decision(wanted, f"pin: {pattern!r}")
        matches = [p for p, node in enumerate(nodes) if read[p] and _matches(pattern, node)]
        if not matches:
            raise RematError(
                f"pin={pattern!r} matches no activation that backward reads; write 'modules::op' as in "
                f"'layers.*.mlp::aten.mm.default', or a name that explain shows"
            )
        if pattern.endswith("::") and len(matches) > 1:  # whole modules: what has a choice in them
            matches = [p for p in matches if not _obstacle(program, p, decision)] or matches
        for p in matches:
            if obstacle := _obstacle(program, p, decision):
                raise RematError(f"pin: {obstacle}")
            forward[p] = forward[p]._replace(pin=decision)
    return dataclasses.replace(program, forward=tuple(forward))


def with_must(program: Program, nodes: Sequence[fx.Node]) -> Program:
    """The program with what the model's own selective checkpointing says *must* be saved or recomputed. What it prefers, and
    plain `torch.utils.checkpoint`, is left to the budget."""
    forward = list(program.forward)
    for p, (op, node) in enumerate(zip(program.forward, nodes, strict=True)):
        policy = node.meta.get("recompute")
        if not any(program.values[v].reads for v in op.outputs):
            continue
        if policy is CheckpointPolicy.MUST_SAVE:
            forward[p] = op._replace(pin=Decision.SAVE)
        elif policy is CheckpointPolicy.MUST_RECOMPUTE and program.may_recompute(p):
            forward[p] = op._replace(pin=Decision.RECOMPUTE)
    return dataclasses.replace(program, forward=tuple(forward))


def _matches(pattern: str, node: fx.Node) -> bool:
    modules, separator, op = pattern.rpartition("::")
    if not separator:
        return fnmatchcase(node.name, pattern.split(".")[0])
    return _is_on(modules, module_path(node)) and fnmatchcase(str(node.target), op or "*")


def _is_on(modules: str, path: str) -> bool:
    wanted, parts = modules.split(".") if modules else [], path.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[i:], wanted)) for i in starts)


def _obstacle(program: Program, position: int, decision: Decision) -> str:
    """Why the decision cannot be carried out for an op's results; "" where it can."""
    for value in (program.values[v] for v in program.forward[position].outputs):
        if decision is Decision.RECOMPUTE and value.pinned:
            return f"{value.name} cannot be recomputed: {value.pinned}"
        if decision is Decision.OFFLOAD and program.parts:
            return f"{value.name} cannot move to the host in a model rewritten block by block"
        if decision is Decision.OFFLOAD and value.is_output:
            return f"moving {value.name} to the host would free nothing: it is {value.pinned}"
    return ""
