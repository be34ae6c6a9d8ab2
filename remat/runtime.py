"""How a checkpoint region runs eagerly: dropped values are recomputed one by one, when backward asks for them.

A region is a stretch of the forward graph. While it runs, `saved_tensors_hooks` hand autograd a `Handle` in place of each
tensor whose value the plan drops. For every dropped node there is a `Cell` (cells.py), a suspended call: the op and its inputs,
which are other cells or tensors that stay. Unpacking a handle forces its cell, which forces the cells it reads. Compared with
`torch.utils.checkpoint.checkpoint(use_reentrant=False)`, whose hooks this follows, no dispatch mode runs, the region does not
rematerialize at once, and random state is kept per random op.

All regions of one step share a `StepState`, since a value that moves to the host is made in one, and read, let go of and asked
back in others.

Retained graphs, double backward and partial backward need no care: handles that live keep what they need alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from remat import _torch
from remat._torch import pytree
from remat.cells import Cell, Handle, rng_state, unpack
from remat.errors import RewriteError
from remat.steps import RegionProgram, Step
from remat.transfer import Moved


@dataclass
class StepState:
    """What the regions of one step know of each other: the cells of offloaded values, by storage and by name of the node."""

    owners: dict[int, tuple[weakref.ref[torch.UntypedStorage], Cell]] = field(default_factory=dict)
    moving: dict[str, list[weakref.ref[Cell]]] = field(default_factory=dict)

    def move(self, step: Step, value: Any) -> None:
        """Start to copy an op's results out."""
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.numel()]
        cells = []
        for tensor in (tensors[i] for i in step.offloaded):
            cell = Cell(None, [])
            cell.moved = Moved(tensor.untyped_storage())
            self.owners[_torch.storage_key(tensor)] = weakref.ref(tensor.untyped_storage()), cell
            cells.append(weakref.ref(cell))
        self.moving[step.name] = cells

    def moved(self, names: Sequence[str]) -> list[Moved]:
        """The values of these nodes that are still wanted and not back yet."""
        return _moved([reference for name in names for reference in self.moving.get(name, ())])

    def reloader(self, names: Sequence[str]) -> Callable[[torch.Tensor], None]:
        """A gradient hook that starts the copies back. It keeps no value alive."""
        cells = [reference for name in names for reference in self.moving.get(name, ())]

        def reload(_: torch.Tensor) -> None:
            for moved in _moved(cells):
                moved.reload()

        return reload


def _moved(cells: Sequence[weakref.ref[Cell]]) -> list[Moved]:
    alive = [reference() for reference in cells]
    return [cell.moved for cell in alive if cell is not None and cell.moved is not None]


_step: ContextVar[StepState | None] = ContextVar("step", default=None)


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """Regions run within belong to the same step."""
    token = _step.set(StepState())
    try:
        yield
    finally:
        _step.reset(token)


@dataclass
class _Run:
    """One forward run of a region."""

    program: RegionProgram
    env: list[Any]
    state: StepState
    cells: dict[int, Cell | list[Cell]] = field(default_factory=dict)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    owners: dict[int, tuple[weakref.ref[torch.UntypedStorage], Cell]] = field(default_factory=dict)
    pending: list[Handle] | None = None
    group: list[weakref.ref[Handle]] = field(default_factory=list)

    def owner(self, tensor: torch.Tensor) -> Cell | None:
        """The cell of the dropped storage behind a tensor. A dead storage's key may since belong to another."""
        key = _torch.storage_key(tensor)
        for owners in (self.owners, self.state.owners):
            found = owners.get(key)
            if found is not None and found[0]() is not None:
                return found[1]
        return None

    def _own(self, tensor: torch.Tensor, cell: Cell) -> None:
        self.owners[_torch.storage_key(tensor)] = weakref.ref(tensor.untyped_storage()), cell

    def pack(self, tensor: torch.Tensor) -> Any:
        owner = self.owner(tensor)
        if tensor.grad_fn is not None:  # an output that kept its own op alive would never go where backward does not come
            tensor = tensor.detach()
        if (owner is None and self.pending is None) or tensor.is_conj() or tensor.is_neg():
            return tensor, tensor._version
        handle = Handle(tensor, owner, self.group)
        if self.program.has_repeats:
            self.group.append(weakref.ref(handle))
        if owner is None:
            assert self.pending is not None
            self.pending.append(handle)
        return handle

    def clear(self) -> None:
        for handle in self.pending or ():  # of an op that failed
            handle.kept = None
        for part in (self.env, self.cells, self.kept, self.owners):
            part.clear()
        self.state = StepState()

    def source(self, slot: int) -> Any:
        """What a cell reads for a slot: another cell, or the tensor without its autograd history."""
        if slot in self.cells:
            return self.cells[slot]
        if slot not in self.kept:
            tensor = self.env[slot]
            owner = self.owner(tensor)
            if owner is not None and not tensor.is_conj() and not tensor.is_neg():
                return Handle(tensor, owner)
            self.kept[slot] = tensor.detach() if tensor.grad_fn is not None else tensor
        return self.kept[slot]

    def suspend(self, step: Step) -> Cell | list[Cell]:
        """The cell of a dropped step; for a getitem the part that its call already has."""
        if step.item is not None:
            parts = self.cells[step.slots[0]]
            assert isinstance(parts, list)
            return parts[step.item]
        inputs = [self.source(slot) for slot in step.again_slots]
        return Cell(step, inputs, rng_state(step.random) if step.random is not None else None)

    def own(self, step: Step, cell: Cell | list[Cell], value: Any) -> Cell | list[Cell]:
        """Note which cell each new storage belongs to."""
        assert isinstance(cell, Cell)
        if isinstance(value, torch.Tensor):
            if self.owner(value) is None:
                self._own(value, cell)
        else:
            parts = [cell.part() for _ in value]
            for part, leaf in zip(parts[: step.remade], value[: step.remade], strict=True):
                if isinstance(leaf, torch.Tensor) and leaf.numel():
                    self._own(leaf, part)
            cell = parts
        return cell

    def settle(self) -> None:
        """Give the handles packed while an op ran to the cells that its results have since."""
        for handle in self.pending or ():
            assert handle.kept is not None
            owner = self.owner(handle.kept)
            if owner is not None:
                handle.cell, handle.kept = owner, None
        self.pending = None


def run_region(program: RegionProgram, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Run a region under autograd; backward will recompute what the plan drops."""
    if _torch.in_functorch():
        raise RewriteError(
            "torch.func transforms cannot run checkpoint regions (they disable saved-tensor hooks); transform the original "
            "module, or plan with budget=None"
        )
    state = _step.get() or StepState()
    run = _Run(program, [*inputs, *[None] * (program.n_slots - program.n_inputs)], state)
    try:
        with torch.autograd.graph.saved_tensors_hooks(run.pack, unpack):
            for step in program.steps:
                _run_step(run, step)
        return tuple(run.env[slot] for slot in program.outputs)
    finally:
        run.clear()  # autograd holds on to the pack hook, and so to the run


def _run_step(run: _Run, step: Step) -> None:
    env = run.env
    run.group = []
    if step.is_plain:
        env[step.out] = step.call(*[env[slot] for slot in step.slots])
    else:
        env[step.out] = _run_tracked(run, step, [env[slot] for slot in step.slots])
    for slot in step.dead:
        env[slot] = None
    if step.releases:
        for moved in run.state.moved(step.releases):
            moved.release()


def _run_tracked(run: _Run, step: Step, values: list[Any]) -> Any:
    """Run an op whose results will be computed again, or move."""
    cell = run.suspend(step) if step.dropped or step.repeats else None
    run.pending = [] if cell is not None or step.offloaded else None
    result = step.call(*values)
    if cell is not None:
        run.cells[step.out] = cell if step.item is not None else run.own(step, cell, result)
    if isinstance(cell, Cell) and not step.dropped:
        cell.fill(pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result))
    elif step.offloaded:
        run.state.move(step, result)
    run.settle()
    if step.reloads and result.grad_fn is not None:
        result.register_hook(run.state.reloader(step.reloads))
    return result
