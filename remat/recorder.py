"""What a training step on fake tensors does to memory: an eager run, watched below autograd.

The joint graph says what backward reads; it does not say when autograd lets go of it. An eager step on fake tensors does:
the same ops in the same order, the same saved-tensor hooks as the runtime, the C++ lifetimes of gradients and of the
temporaries inside a derivative formula. No memory is allocated and no kernel runs. (DESIGN.md plans door 1 on the joint
graph; measured, this recording predicts the eager peak more closely, and it needs no rules about autograd.)
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat._torch import pytree
from remat.captured import Captured
from remat.cost import op_cost_us
from remat.devices import DeviceProfile
from remat.errors import CaptureError
from remat.export import DOOR_2
from remat.fake_kernels import IN_PLACE_IN_FORMULAS, as_run
from remat.functions import FunctionCall
from remat.opaque import GRADIENTS
from remat.passes.aliasing import results
from remat.recorded import Kernel, Ran, Storage
from remat.steps import bind, made_again, recompute_inputs
from remat.workspace import Call

aten = torch.ops.aten


class _Token:
    """Stands for a packed tensor; its death is the moment autograd lets go."""

    __slots__ = ("__weakref__", "storage", "tensor")

    def __init__(self, tensor: torch.Tensor, storage: Storage | None) -> None:
        self.tensor, self.storage = tensor, storage


@dataclass
class _Inside:
    """What an autograd function does in forward: the time of its ops, what they make, and the bytes of that which live after
    each of them."""

    cost_us: float = 0.0
    live_bytes: int = 0
    made: list[Storage] = field(default_factory=list)
    calls: list[tuple[Call | None, int]] = field(default_factory=list)

    def make(self, storage: Storage) -> None:
        self.made.append(storage)
        self.live_bytes += storage.bytes


class Recorder(_torch.TorchDispatchMode):
    """Counts positions, notes each storage's birth and death, and each op's cost.

    Forward ops are those of the graphs given to `run_graph`, and every kernel that runs outside of them, as one of `module`.
    """

    def __init__(self, device: DeviceProfile) -> None:
        super().__init__()
        self.device = device
        self.position = 0
        self.in_forward = True
        self.in_graph = False
        self.module = ""
        self.meets_real = False  # whether what runs may find tensors with values elsewhere
        self.found: list[torch.Tensor] = []  # those that a loss found
        self.loss_ops = 0
        self.first = 0  # what autograd's nodes of this step are numbered from
        self.ran: list[Ran] = []
        self.kernels: list[Kernel] = []
        self.all: list[Storage] = []
        self.gradient_ready: dict[int, int] = {}
        self._storages: dict[int, Storage] = {}
        self._known: dict[int, torch.UntypedStorage] = {}  # held, since the next one made may get the key of one that is gone
        self._sequence: list[int] = []  # autograd's count after each forward op
        self._others = fx.Graph()
        self._pauses = False
        self._in_loss = False
        self._around: int | None = None  # the number of the autograd node that runs all this, as a checkpoint's does
        self._inside: _Inside | None = None
        self._finished: int | None = None  # the number of the autograd node whose gradients go on to others now
        self._sums: list[tuple[Storage, Storage, int]] = []

    def know(self, tensor: torch.Tensor) -> None:
        """Parameters and inputs are resident: never counted."""
        self._known[_torch.storage_key(tensor)] = tensor.untyped_storage()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Forward runs within."""
        self._around = _torch.running_sequence_number()
        self.first = _torch.sequence_number()
        with self, torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What autograd saves within is not part of the step. To be used without dispatch modes."""
        self._pauses = True
        try:
            yield
        finally:
            self._pauses = False

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Backward runs within, after forward; the step ends with it."""
        self.in_forward = False
        self.position = len(self.ran)
        with self:
            yield
        self.position += 1
        self.kernels.append(Kernel("end of step", 0.0, None, -1))
        self._add_in_place()

    def run_loss(self, loss_of: Callable[[], Any]) -> Any:
        """What comes after the model, as a part of backward: no plan decides about it."""
        self.meets_real = self._in_loss = True
        try:
            return loss_of()
        finally:
            self._in_loss = False
            self.loss_ops = len(self.kernels)

    def watch_sums(self, loss: torch.Tensor) -> None:
        """Learn which additions in backward from `loss` are autograd's, of the gradients of what has several readers."""
        for node in _torch.autograd_nodes(loss):
            if not _torch.is_leaf_node(node):
                node.register_hook(self._finish)

    def _finish(self, *_: Any) -> None:
        self._finished = _torch.running_sequence_number()

    def _add_in_place(self) -> None:
        """Autograd adds to a gradient in its place where nothing else holds that (`accumulate` in its input_buffer.cpp). Fake
        ones it does not; those ended with the addition."""
        written_over = set()
        for old, new, position in reversed(self._sums):
            if old.dies == position:
                old.dies, old.kind = new.dies, new.kind
                written_over.add(id(new))
        self.all = [storage for storage in self.all if id(storage) not in written_over]

    def run_graph(self, captured: Captured, inputs: list[torch.Tensor]) -> list[Any]:
        """Run a captured forward graph op by op, without autocast, since its casts are in the graph. `inputs` has a tensor for
        each placeholder, all held by the caller."""
        nodes = list(captured.graph.nodes)
        self.meets_real |= any(isinstance(node.target, FunctionCall) for node in nodes)
        env: dict[fx.Node, Any] = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
        last = {source: node for node in nodes for source in node.all_input_nodes}
        self.in_graph = True
        for node in nodes:
            if node.op != "call_function":
                continue
            self.position = len(self.ran)
            call, order = bind(node)
            values = [env[source] for source in order]
            self._inside = _Inside() if isinstance(node.target, FunctionCall) else None
            with _torch.without_autocast():
                out = env[node] = call(*values)
            self.note(out)
            self._watch(out)
            read = self.behind([env[source] for source in node.all_input_nodes])
            again = self.behind([env[source] for source in recompute_inputs(node)])
            made = self.behind(made_again(node, out))
            if self._inside is None:
                self._ran(node, _node_cost(node, values, out, self.device), read, made, again)
            else:
                self._ran(node, (self._inside.cost_us, None), read, made, again, self._calls_of_function(read, made))
            del values, out
            for source in node.all_input_nodes:
                if last[source] is node:
                    env.pop(source, None)
            if node not in last:
                del env[node]
        self.in_graph = False
        return [env[node] for node in results(captured.graph)]

    def behind(self, values: Any) -> tuple[Storage, ...]:
        """The counted storages behind all tensors in `values`, each once."""
        leaves = [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor) and t.numel()]
        found = (self._storages.get(_torch.storage_key(t)) for t in leaves)
        return tuple({id(s): s for s in found if s is not None}.values())

    def _calls_of_function(self, read: tuple[Storage, ...], made: tuple[Storage, ...]) -> tuple[tuple[Call | None, int], ...]:
        """The ops of the function that just ran, for `Ran.inside`. What lived within it only is its scratch, and what autograd
        keeps of it is when it runs again."""
        inside, self._inside = self._inside, None
        assert inside is not None
        gone = {id(storage) for storage in inside.made if storage.dies >= 0}
        self.all = [storage for storage in self.all if id(storage) not in gone]
        for storage in (*read, *made):
            storage.in_function = True
        own = sum(storage.bytes for storage in made)
        return tuple((call, max(live - own, 0)) for call, live in inside.calls)

    def _ran(
        self,
        node: fx.Node,
        cost: tuple[float, Call | None],
        read: tuple[Storage, ...],
        made: tuple[Storage, ...],
        again: tuple[Storage, ...] = (),
        inside: tuple[tuple[Call | None, int], ...] = (),
    ) -> None:
        for storage in read:
            storage.last_forward = self.position
        for storage in made:
            if storage.node is None and storage.born == self.position:
                storage.node = node
        self._sequence.append(_torch.sequence_number())
        self.ran.append(Ran(node, *cost, made, again, inside))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.in_forward and _torch.running_sequence_number() not in (None, self._around) and not self._pauses:
            raise CaptureError(f"the model {GRADIENTS}, for which there is no plan; without create_graph, {DOOR_2}")
        if self.in_forward and not self.in_graph:
            self.position = len(self.ran)
        if self.meets_real and func is not aten.lift_fresh.default:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        out = as_run(func, args, kwargs, func(*args, **kwargs))
        if func in IN_PLACE_IN_FORMULAS and self._made_for_this(args[0]):
            out = args[0]
        if self.in_forward:
            self.note(out)
        if not _counts(func) or (self.in_graph and self._inside is None):  # `run_graph` counts its ops itself
            return out
        cost_us, call = _cost(func, args, kwargs, out, self.device)
        if not self.in_forward:
            self.kernels.append(Kernel(str(func), cost_us, call, self._origin()))
            self.position += 1
            self.note(out)
            self._note_sum(func, args, out)
        elif self._inside is not None:
            self._inside.cost_us += cost_us
            self._inside.calls.append((call, self._inside.live_bytes))
        else:
            self._ran(self._other(func), (cost_us, call), self.behind((args, kwargs)), self.behind(out))
        return out

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor for one that a function finds elsewhere and that is there whatever the plan."""
        if _torch.is_fake(tensor):
            return tensor
        if self._in_loss:
            self.found.append(tensor)
        fake = _torch.fake_like(tensor)
        self.know(fake)
        return fake

    def _made_for_this(self, tensor: torch.Tensor) -> bool:
        """Whether a derivative formula has made these zeros just now."""
        if self.in_forward or not _torch.runs_formula_of_torch():
            return False
        storage = self._storages.get(_torch.storage_key(tensor))
        return storage is not None and storage.born == self.position - 1 and "zeros" in self.kernels[-1].name

    def _other(self, func: Any) -> fx.Node:
        """Stands for a kernel that ran outside of the graphs."""
        node = self._others.call_function(func)
        node.meta = {"nn_module_stack": {"": (self.module, None)}}
        return node

    def _origin(self) -> int:
        """The forward op whose gradient is being computed, or was, where autograd adds it to others; -1 for none."""
        number = _torch.running_sequence_number()
        found = -1 if number is None else bisect_right(self._sequence, number)
        return found if found < len(self._sequence) else -1

    def note(self, out: Any) -> None:
        """Count the storages behind what has just been made."""
        at = self.position if self.in_forward else self.position - 1
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                continue
            if tensor.layout is not torch.strided:
                raise CaptureError(f"a step has tensors of layout {tensor.layout}, for which there is no plan; {DOOR_2}")
            key = _torch.storage_key(tensor)
            if key in self._known or key in self._storages:
                continue
            raw = tensor.untyped_storage()
            storage = self._storages[key] = Storage(self.device.allocated_bytes(raw.nbytes()), at)
            self.all.append(storage)
            if self._inside is not None:
                self._inside.make(storage)
            weakref.finalize(raw, self._died, key, storage)

    def _note_sum(self, func: Any, args: Any, out: Any) -> None:
        """Note that autograd adds up gradients, if it does."""
        number = _torch.running_sequence_number()
        adds = func is aten.add.Tensor and isinstance(args[1], torch.Tensor)
        if not adds or number is None or number != self._finished:
            return
        old, more, new = (self._storages.get(_torch.storage_key(t)) for t in (*args, out))
        if old is None or new is None or old is more or args[0]._is_view():  # a view's base holds its memory too
            return
        self._sums.append((old, new, self.position - 1))

    def _died(self, key: int, storage: Storage) -> None:
        storage.dies = self.position - (0 if self.in_forward else 1)
        if self._inside is not None and storage.born == self.position:
            self._inside.live_bytes -= storage.bytes
        if self._storages.get(key) is storage:
            del self._storages[key]

    def _watch(self, out: Any) -> None:
        """Note when the gradient of a forward op's result is complete."""
        if isinstance(out, torch.Tensor) and out.grad_fn is not None:
            position = self.position
            out.register_hook(lambda _: self.gradient_ready.setdefault(position, self.position) and None)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if self._pauses:
            return tensor
        self.note(tensor)  # an output that is saved before its op returns
        storage = self._storages.get(_torch.storage_key(tensor))
        token = _Token(tensor.detach(), storage)  # what an op returns would hold its node, and that the token
        if storage is not None:
            storage.packed += 1
            weakref.finalize(token, self._released, storage)
        return token

    def _unpack(self, token: Any) -> torch.Tensor:
        if isinstance(token, torch.Tensor):
            return token
        if token.storage is not None:
            token.storage.reads.append(self.position)
        return token.tensor

    def _released(self, storage: Storage) -> None:
        storage.released += 1
        if not self.in_forward:
            storage.release = max(storage.release, self.position - 1)


def _counts(func: Any) -> bool:
    """Whether a kernel runs: not for views, nor for what is no op."""
    if not isinstance(func, _torch.OpOverload) or func.namespace == "prim":
        return False
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not views and func not in (aten._unsafe_view.default, aten.detach.default)


def _node_cost(node: fx.Node, values: list[Any], out: Any, device: DeviceProfile) -> tuple[float, Call | None]:
    if not _counts(node.target):
        return 0.0, None
    filled = iter(values)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: next(filled))
    return _cost(node.target, tuple(args), dict(kwargs), out, device)


def _cost(func: Any, args: Any, kwargs: Any, out: Any, device: DeviceProfile) -> tuple[float, Call | None]:
    return op_cost_us(func, args, kwargs, out, device), Call.of(func, args, kwargs)
