"""How a checkpoint region runs eagerly: dropped values are recomputed one by one, when backward asks for them.

A region is a stretch of the forward graph. While it runs, `saved_tensors_hooks` hand autograd a `Handle` in place of each
tensor whose value the plan drops. For every dropped node there is a `Cell`, a suspended call: the op and its inputs, which
are other cells or tensors that stay. Unpacking a handle forces its cell, which forces the cells it reads. A cell that has
its value lets go of its inputs, so plain reference counting frees every tensor after its last reader, and nothing is
computed that backward does not read. Compared with `torch.utils.checkpoint.checkpoint(use_reentrant=False)`, whose hooks
this follows, no dispatch mode runs, the region does not rematerialize at once, and random state is kept per random op.

Values that the plan moves to the host have cells too, which hold a `transfer.Moved` in place of a call: forcing them takes the
value from there. All regions of one step share a `StepState`, since a value made in one is read, let go of and asked back in
others.

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
from remat.errors import RewriteError
from remat.steps import RegionProgram, Step
from remat.transfer import Moved


class Cell:
    """A dropped or offloaded value: a suspended call, or a value on the host, until it is forced, then the value.

    An op with several outputs has a cell for the call and one part for each output; the call's cell fills the parts that
    are still alive and keeps nothing, so that each output is freed on its own. Inputs are tensors, cells, and handles of
    tensors that lie in the storage of a cell.
    """

    __slots__ = ("__weakref__", "inputs", "moved", "parts", "rng", "step", "value", "versions", "waiting")

    def __init__(self, step: Step | None, inputs: list[Any], rng: Any = None) -> None:
        self.step = step
        self.inputs = inputs
        self.versions = [i._version if isinstance(i, torch.Tensor) else -1 for i in inputs]
        self.rng = rng
        self.moved: Moved | None = None
        self.value: Any = None
        self.parts: list[weakref.ref[Cell]] = []
        self.waiting = True

    def part(self) -> Cell:
        part = Cell(None, [self])
        self.parts.append(weakref.ref(part))
        return part

    def force(self) -> Any:
        """The value, computed now if it was not yet, and its dropped inputs before it."""
        if self.waiting:
            with torch.no_grad(), _torch.without_autocast():  # backward may be called within autocast
                _force(self)
        return self.value


def _force(cell: Cell) -> None:
    stack = [cell]
    while stack:
        top = stack[-1]
        cells = [i.cell if isinstance(i, Handle) else i for i in top.inputs] if top.waiting else []
        missing = [i for i in cells if isinstance(i, Cell) and i.waiting and i.moved is None]
        if missing:
            stack.extend(reversed(missing))
            continue
        stack.pop()
        if top.waiting:
            _compute(top)


def _compute(cell: Cell) -> None:
    if cell.moved is not None:
        _come_back(cell)
        return
    step = cell.step
    assert step is not None, "a part is filled by the call it belongs to"
    for tensor, version in zip(cell.inputs, cell.versions, strict=True):
        if version >= 0 and tensor._version != version:
            raise RewriteError(
                f"a tensor of shape {tuple(tensor.shape)} that {step.name} is recomputed from was modified in place between "
                "forward and backward; call backward before the optimizer's step"
            )
    values = [_value(i) for i in cell.inputs]
    result = step.again(*values) if cell.rng is None else _with_rng(cell.rng, step.again, values)
    cell.inputs, cell.rng, cell.waiting = [], None, False
    if isinstance(result, torch.Tensor):
        cell.value = result
        return
    for reference, leaf in zip(cell.parts, result, strict=False):
        part = reference()
        if part is not None:
            part.value, part.inputs, part.waiting = leaf, [], False


def _come_back(cell: Cell) -> None:
    assert cell.moved is not None
    cell.value, cell.moved, cell.waiting = cell.moved.tensor(), None, False


def _value(source: Any) -> Any:
    """What a cell reads, now that the cells it needs have been computed; what is on the host is waited for last."""
    if isinstance(source, Handle):
        return source.tensor()
    if isinstance(source, Cell):
        if source.moved is not None:
            _come_back(source)
        return source.value
    return source


def _rng_state(device: torch.device) -> tuple[torch.device, torch.Tensor]:
    return device, torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _with_rng(rng: tuple[torch.device, torch.Tensor], call: Callable[..., Any], values: list[Any]) -> Any:
    device, state = rng
    _, now = _rng_state(device)
    _set_rng_state(device, state)
    try:
        return call(*values)
    finally:
        _set_rng_state(device, now)


class Handle:
    """What autograd keeps for a dropped tensor: the cell of its storage, and how this tensor lies in it."""

    __slots__ = ("cell", "kept", "layout")

    def __init__(self, tensor: torch.Tensor, cell: Cell | None) -> None:
        self.cell = cell
        self.kept = tensor if cell is None else None
        self.layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def tensor(self) -> torch.Tensor:
        if self.cell is None:
            assert self.kept is not None
            return self.kept
        base = self.cell.force()
        dtype, shape, stride, offset = self.layout
        if base.dtype == dtype and base.shape == shape and base.stride() == stride and base.storage_offset() == offset:
            return base
        view = torch.empty(0, dtype=dtype, device=base.device)
        return view.set_(base.untyped_storage(), offset, shape, stride)


def unpack(packed: Any) -> torch.Tensor:
    """The unpack hook: a tensor that stayed (checked against in-place changes) or a dropped one."""
    if isinstance(packed, Handle):
        return packed.tensor()
    tensor, version = packed
    if tensor._version != version:
        raise RewriteError(
            f"a saved tensor of shape {tuple(tensor.shape)} was modified in place between forward and backward "
            f"(version {tensor._version}, expected {version})"
        )
    return tensor


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
        if (owner is None and self.pending is None) or tensor.is_conj() or tensor.is_neg():
            return tensor, tensor._version
        handle = Handle(tensor, owner)
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
            if owner is not None:
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
        return Cell(step, inputs, _rng_state(step.random) if step.random is not None else None)

    def own(self, step: Step, cell: Cell | list[Cell], value: Any) -> Cell | list[Cell]:
        """Note which cell each new storage belongs to."""
        assert isinstance(cell, Cell)
        if isinstance(value, torch.Tensor):
            if self.owner(value) is None:
                self._own(value, cell)
        else:
            parts = [cell.part() for _ in value]
            for part, leaf in zip(parts, value, strict=True):
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
    values = [env[slot] for slot in step.slots]
    cell = run.suspend(step) if step.dropped else None
    run.pending = [] if step.dropped or step.offloaded else None
    result = env[step.out] = step.call(*values)
    if cell is not None:
        run.cells[step.out] = cell if step.item is not None else run.own(step, cell, result)
    elif step.offloaded:
        run.state.move(step, result)
    run.settle()
    if step.reloads and result.grad_fn is not None:
        result.register_hook(run.state.reloader(step.reloads))
    del values, result
    for slot in step.dead:
        env[slot] = None
    for moved in run.state.moved(step.releases):
        moved.release()
