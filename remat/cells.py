"""Values that are not kept for backward: suspended calls, computed when autograd asks for them.

A `Cell` is an op and its inputs, which are other cells or tensors that stay. A cell that has its value lets go of its inputs,
so plain reference counting frees every tensor after its last reader, and nothing is computed that backward does not read.
Values that the plan moves to the host have cells too, which hold a `transfer.Moved` in place of a call: forcing them takes the
value from there.

A cell that `repeats` keeps its inputs, and has a value only for as long as one op of backward needs it (`remat.schedule`). So
all that this op asks for is computed together, when it asks for the first of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from remat import _torch
from remat.errors import RewriteError
from remat.steps import Step
from remat.transfer import Moved


class Cell:
    """A dropped, repeated or offloaded value: a suspended call, or a value on the host, until it is forced, then the value.

    An op with several outputs has a cell for the call and one part for each output; the call's cell fills the parts that
    are still alive and keeps nothing, so that each output is freed on its own. Inputs are tensors, cells, and handles of
    tensors that lie in the storage of a cell; that of a part is the call. `repeats` is how often the call's results will be
    let go of before they are held.
    """

    __slots__ = ("__weakref__", "inputs", "moved", "parts", "repeats", "rng", "step", "value", "versions", "waiting")

    def __init__(self, step: Step | None, inputs: list[Any], rng: Any = None) -> None:
        self.step = step
        self.inputs = inputs
        self.versions = [_version(i) if isinstance(i, torch.Tensor) else -1 for i in inputs]
        self.rng = rng
        self.moved: Moved | None = None
        self.value: Any = None
        self.parts: list[weakref.ref[Cell]] = []
        self.repeats = step.repeats if step is not None else 0
        self.waiting = True

    def part(self) -> Cell:
        part = Cell(None, [self])
        self.parts.append(weakref.ref(part))
        return part

    @property
    def call(self) -> Cell:
        """The cell of the op that makes the value."""
        return self.inputs[0] if self.step is None and self.inputs else self

    @property
    def results(self) -> list[Cell]:
        """Cells for what the call returns: its parts that are alive, or itself."""
        return [part for reference in self.parts if (part := reference()) is not None] if self.parts else [self]

    def force(self) -> Any:
        """The value, computed now if it was not yet, and its dropped inputs before it."""
        if self.waiting:
            with torch.no_grad(), _torch.without_autocast():  # backward may be called within autocast
                waiting = _lacking([self])
                while waiting:
                    _compute(waiting.pop())
        return self.value

    def fill(self, result: Any) -> None:
        """Take what the call returned. If it will not run again, its inputs go."""
        if not self.repeats:
            self.inputs, self.rng = [], None
        self.waiting = False
        if isinstance(result, torch.Tensor):
            self.value = result
            return
        for reference, leaf in zip(self.parts, result, strict=False):
            part = reference()
            if part is not None:
                part.value, part.waiting = leaf, False

    def let_go(self) -> None:
        """Of the results of a call that will run again."""
        self.repeats -= 1
        self.waiting = True
        for cell in self.results:
            cell.value, cell.waiting = None, True


def _lacking(cells: Sequence[Cell]) -> list[Cell]:
    """Those of the cells that wait, with the waiting ones that they are computed from; the last is to be computed first."""
    order: list[Cell] = []
    found: set[int] = set()
    stack = [*reversed(cells)]
    while stack:
        top = stack[-1]
        sources = _sources(top) if top.waiting and id(top) not in found else []
        missing = [cell for cell in sources if cell.waiting and cell.moved is None and id(cell) not in found]
        if missing:
            stack.extend(reversed(missing))
            continue
        stack.pop()
        if top.waiting and id(top) not in found:
            found.add(id(top))
            order.append(top)
    return [cell for cell in reversed(order) if cell.step is not None or cell.moved is not None]


def _place(cell: Cell) -> int:
    """Where in its region a value is made."""
    step = cell.call.step
    return step.out if step is not None else -1


def _sources(cell: Cell) -> list[Cell]:
    cells = [i.cell if isinstance(i, Handle) else i for i in cell.inputs]
    return [i for i in cells if isinstance(i, Cell)]


def _compute(cell: Cell) -> None:
    if cell.moved is not None:
        _come_back(cell)
        return
    cell.fill(_again(cell, [_value(i) for i in cell.inputs]))


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def _again(cell: Cell, values: list[Any]) -> Any:
    """What the cell's call returns, on the values of its inputs."""
    step = cell.step
    assert step is not None, "a part is filled by the call it belongs to"
    for tensor, version in zip(cell.inputs, cell.versions, strict=True):
        if version >= 0 and _version(tensor) != version:
            raise RewriteError(
                f"a tensor of shape {tuple(tensor.shape)} that {step.name} is recomputed from was modified in place between "
                "forward and backward; call backward before the optimizer's step"
            )
    return step.again(*values) if cell.rng is None else _with_rng(cell.rng, step.again, values)


def computed_apart(cell: Cell) -> Any:
    """The value of a cell that goes on waiting, as do those that it is computed from: backward leaves its graph for another,
    so that autograd lets go of nothing. What waits on the host comes back."""
    made: dict[int, Any] = {}
    waiting = _lacking([cell])
    uses = Counter(id(source) for waits in waiting for source in _sources(waits))
    with torch.no_grad(), _torch.without_autocast():
        while waiting:
            now = waiting.pop()
            if now.moved is not None:
                _come_back(now)
                continue
            result = _again(now, [_value_among(made, source) for source in now.inputs])
            if isinstance(result, torch.Tensor):
                made[id(now)] = result
            else:
                made.update((id(reference()), leaf) for reference, leaf in zip(now.parts, result, strict=False))
            for source in _sources(now):
                uses[id(source)] -= 1
                if not uses[id(source)]:
                    made.pop(id(source), None)
    return made[id(cell)] if cell.waiting else cell.value


def _value_among(made: Mapping[int, Any], source: Any) -> Any:
    """`_value`, where the values of some cells, by their ids, are not with them."""
    cell = source.cell if isinstance(source, Handle) else source
    if not isinstance(cell, Cell) or id(cell) not in made:
        return _value(source)
    return source.laid(made[id(cell)]) if isinstance(source, Handle) else made[id(cell)]


def compute_together(handles: Sequence[Handle]) -> None:
    """All that one op of backward asks for. What repeats is let go of after its last reader here, but for what the handles
    are given."""
    asked = sorted((handle.cell for handle in handles if handle.cell is not None), key=_place)
    given = {id(cell) for cell in asked}
    waiting = _lacking(asked)
    uses = Counter(id(source) for cell in waiting for source in _sources(cell))
    passing = {id(cell.call): cell.call for cell in asked if cell.call.repeats}
    with torch.no_grad(), _torch.without_autocast():
        while waiting:
            cell = waiting.pop()
            read = [source for source in _sources(cell) if source.call.repeats]
            passing.update((id(call), call) for call in (cell, *(source.call for source in read)) if call.repeats)
            _compute(cell)
            uses.subtract(map(id, read))
            for source in (*read, *(cell.results if cell.repeats else ())):
                if not uses[id(source)] and id(source) not in given:
                    source.value = None
    for handle in handles:
        handle.given = handle.cell.value if handle.cell is not None else None
    for call in passing.values():
        call.let_go()


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


def rng_state(device: torch.device) -> tuple[torch.device, torch.Tensor]:
    return device, torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _with_rng(rng: tuple[torch.device, torch.Tensor], call: Callable[..., Any], values: list[Any]) -> Any:
    device, state = rng
    _, now = rng_state(device)
    _set_rng_state(device, state)
    try:
        return call(*values)
    finally:
        _set_rng_state(device, now)


class Handle:
    """What autograd keeps for a dropped tensor: the cell of its storage, and how this tensor lies in it.

    `group` are the handles of all that the same op of backward will ask for, in regions where something repeats; `given` is the
    value that was computed for this one when another was asked for.
    """

    __slots__ = ("__weakref__", "cell", "given", "group", "kept", "layout", "version")

    def __init__(self, tensor: torch.Tensor, cell: Cell | None, group: Sequence[weakref.ref[Handle]] = ()) -> None:
        self.cell = cell
        self.kept = tensor if cell is None else None
        self.version = tensor._version
        self.group = group
        self.given: Any = None
        self.layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def tensor(self) -> torch.Tensor:
        if self.cell is None:
            assert self.kept is not None
            return _unchanged(self.kept, self.version)
        return self.laid(self._base(self.cell))

    def laid(self, base: torch.Tensor) -> torch.Tensor:
        """This tensor, in the storage of its cell's value."""
        dtype, shape, stride, offset = self.layout
        if base.dtype == dtype and base.shape == shape and base.stride() == stride and base.storage_offset() == offset:
            return base
        view = torch.empty(0, dtype=dtype, device=base.device)
        return view.set_(base.untyped_storage(), offset, shape, stride)

    def _base(self, cell: Cell) -> Any:
        if _torch.keeps_graph():
            return computed_apart(cell)
        if not self.group:
            return cell.force()
        if self.given is None:
            alive = (reference() for reference in self.group)
            compute_together([handle for handle in alive if handle is not None and handle.given is None])
        base, self.given = self.given, None
        return base


def unpack(packed: Any) -> torch.Tensor:
    """The unpack hook: a tensor that stayed (checked against in-place changes) or a dropped one."""
    return packed.tensor() if isinstance(packed, Handle) else _unchanged(*packed)


def _unchanged(tensor: torch.Tensor, version: int) -> torch.Tensor:
    if tensor._version != version:
        raise RewriteError(
            f"a saved tensor of shape {tuple(tensor.shape)} was modified in place between forward and backward "
            f"(version {tensor._version}, expected {version})"
        )
    return tensor
