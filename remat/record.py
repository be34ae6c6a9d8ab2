"""From a captured forward graph to a `Program`: run one eager step on fake tensors and write down what lives when.

The joint graph says what backward reads; it does not say when autograd lets go of it. An eager step on fake tensors does:
the same ops in the same order, the same saved-tensor hooks as the runtime, the C++ lifetimes of gradients and of the
temporaries inside a derivative formula. No memory is allocated and no kernel runs. (DESIGN.md plans door 1 on the joint
graph; measured, this recording predicts the eager peak more closely, and it needs no rules about autograd.)
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from remat import _torch
from remat._torch import pytree
from remat.absent import scratch_bytes
from remat.capture import Captured
from remat.cost import op_cost_us
from remat.devices import DeviceProfile
from remat.op_times import OpTimes
from remat.passes.aliasing import results
from remat.passes.pinning import why_pinned
from remat.passes.provenance import module_path
from remat.passes.randomness import is_random
from remat.program import HELD, Fixed, Op, Program, Value
from remat.steps import bind, recompute_inputs
from remat.workspace import Call, workspace_bytes

aten = torch.ops.aten


@dataclass
class _Storage:
    bytes: int
    born: int
    dies: int = -1
    node: fx.Node | None = None
    last_forward: int = -1
    packed: int = 0
    reads: list[int] = field(default_factory=list)
    release: int = -1


class _Kernel(NamedTuple):
    """A backward op: `origin` is the position of the forward op whose gradient it computes."""

    name: str
    cost_us: float
    call: Call | None
    origin: int


class _Token:
    """Stands for a packed tensor; its death is the moment autograd lets go."""

    __slots__ = ("__weakref__", "storage", "tensor")

    def __init__(self, tensor: torch.Tensor, storage: _Storage | None) -> None:
        self.tensor, self.storage = tensor, storage


class _Recorder(_torch.TorchDispatchMode):
    """Counts positions, notes each storage's birth and death, and each kernel's cost."""

    def __init__(self, device: DeviceProfile) -> None:
        super().__init__()
        self.device = device
        self.position = 0
        self.in_forward = True
        self.storages: dict[int, _Storage] = {}
        self.all: list[_Storage] = []
        self.known: set[int] = set()
        self.kernels: list[_Kernel] = []
        self.sequence: list[int] = []  # autograd's count after each forward op
        self.gradient_ready: dict[int, int] = {}

    def know(self, tensor: torch.Tensor) -> None:
        """Parameters and inputs are resident: never counted."""
        self.known.add(_torch.storage_key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.in_forward:
            if _is_free(func) or not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
                return out
            cost = op_cost_us(func, args, kwargs, out, self.device)
            self.kernels.append(_Kernel(str(func), cost, Call.of(func, args, kwargs), self._origin()))
            self.position += 1
        self.note(out)
        return out

    def _origin(self) -> int:
        """The forward op whose gradient is being computed, -1 where autograd only adds gradients up."""
        number = _torch.running_sequence_number()
        found = -1 if number is None else bisect_right(self.sequence, number)
        return found if found < len(self.sequence) else -1

    def note(self, out: Any) -> None:
        at = self.position if self.in_forward else self.position - 1
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                continue
            key = _torch.storage_key(tensor)
            if key in self.known or key in self.storages:
                continue
            raw = tensor.untyped_storage()
            storage = self.storages[key] = _Storage(self.device.allocated_bytes(raw.nbytes()), at)
            self.all.append(storage)
            weakref.finalize(raw, self.died, key, storage)

    def died(self, key: int, storage: _Storage) -> None:
        storage.dies = self.position - (0 if self.in_forward else 1)
        if self.storages.get(key) is storage:
            del self.storages[key]

    def watch(self, position: int, out: Any) -> None:
        """Note when the gradient of a forward op's result is complete."""
        if isinstance(out, torch.Tensor) and out.grad_fn is not None:
            out.register_hook(lambda _: self.gradient_ready.setdefault(position, self.position) and None)

    def pack(self, tensor: torch.Tensor) -> Any:
        self.note(tensor)  # an output that is saved before its op returns
        storage = self.storages.get(_torch.storage_key(tensor))
        token = _Token(tensor, storage)
        if storage is not None:
            storage.packed += 1
            weakref.finalize(token, self.released, storage)
        return token

    def unpack(self, token: _Token) -> torch.Tensor:
        if token.storage is not None:
            token.storage.reads.append(self.position)
        return token.tensor

    def released(self, storage: _Storage) -> None:
        if not self.in_forward:
            storage.release = max(storage.release, self.position - 1)


def _is_free(func: Any) -> bool:
    schema = func._schema
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns) or func in (
        aten._unsafe_view.default,
        aten.detach.default,
    )


def record(
    captured: Captured,
    tensors: Sequence[torch.Tensor],
    device: DeviceProfile,
    resident: Mapping[str, int],
    times: OpTimes | None = None,
) -> Program:
    """Record one training step of the captured graph.

    tensors: one per placeholder; only their metadata is used. times: measured costs; None: those of the device's profile.
    Outputs of the model are counted as held until the step ends. When one output is a scalar that requires grad it is the
    loss; otherwise every output that requires grad gets a dense gradient from outside.
    """
    recorder = _Recorder(device)
    fake = _torch.FakeTensorMode()
    with fake:
        inputs = [_fake_like(tensor) for tensor in tensors]
    for tensor, real in zip(inputs, tensors, strict=True):
        recorder.know(tensor)
        if real.is_leaf and real.grad is not None:
            with fake:
                tensor.grad = torch.empty_like(tensor)
            recorder.know(tensor.grad)
    nodes = [node for node in captured.graph.nodes if node.op == "call_function"]
    with fake, recorder, torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack):
        outputs, costs, produced = _forward(captured, nodes, inputs, recorder)
    recorder.in_forward = False
    recorder.position = len(nodes)
    held = [o for o in outputs if isinstance(o, torch.Tensor)]
    with fake, recorder:
        _backward(held)
    recorder.position += 1
    recorder.kernels.append(_Kernel("end of step", 0.0, None, -1))
    return _program(captured, nodes, recorder, costs, produced, resident, times)


def _fake_like(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fake.requires_grad_(tensor.requires_grad)


def _forward(
    captured: Captured, nodes: list[fx.Node], inputs: list[torch.Tensor], recorder: _Recorder
) -> tuple[list[Any], list[tuple[float, Call | None]], dict[fx.Node, tuple[_Storage, ...]]]:
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    env: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            constant = captured.constants[str(node.target)]
            env[node] = _fake_like(constant)
            recorder.know(env[node])
    last = {source: node for node in captured.graph.nodes for source in node.all_input_nodes}
    costs: list[tuple[float, Call | None]] = []
    produced: dict[fx.Node, tuple[_Storage, ...]] = {}
    for position, node in enumerate(nodes):
        recorder.position = position
        call, order = bind(node)
        values = [env[source] for source in order]
        out = env[node] = call(*values)
        recorder.sequence.append(_torch.sequence_number())
        recorder.note(out)
        recorder.watch(position, out)
        costs.append(_node_cost(node, values, out, recorder.device))
        leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.numel()]
        found = [recorder.storages.get(_torch.storage_key(t)) for t in leaves]
        for storage in found:
            if storage is not None and storage.node is None and storage.born == position:
                storage.node = node
        produced[node] = tuple(storage for storage in found if storage is not None)
        del values, out, leaves, found
        for source in node.all_input_nodes:
            for storage in produced.get(source, ()):
                storage.last_forward = position
            if last[source] is node:
                del env[source]
        if node not in last:
            del env[node]
    return [env[node] for node in results(captured.graph)], costs, produced


def _node_cost(node: fx.Node, values: list[Any], out: Any, device: DeviceProfile) -> tuple[float, Call | None]:
    if not isinstance(node.target, torch._ops.OpOverload) or _is_free(node.target):
        return 0.0, None
    filled = iter(values)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: next(filled))
    cost = op_cost_us(node.target, tuple(args), dict(kwargs), out, device)
    return cost, Call.of(node.target, tuple(args), dict(kwargs))


def _backward(outputs: list[torch.Tensor]) -> None:
    differentiable = [o for o in outputs if o.requires_grad]
    losses = [o for o in differentiable if o.dim() == 0]
    if differentiable:
        (losses[0] if losses else _Loss.apply(*differentiable)).backward()


class _Loss(torch.autograd.Function):
    """Some loss outside of the model: it gives each output a dense gradient, which the engine lets go of after use."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(o.shape, o.dtype, o.device) for o in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _program(
    captured: Captured,
    nodes: list[fx.Node],
    recorder: _Recorder,
    costs: list[tuple[float, Call | None]],
    produced: dict[fx.Node, tuple[_Storage, ...]],
    resident: Mapping[str, int],
    times: OpTimes | None,
) -> Program:
    escaping = {id(s) for node in captured.graph.output_node().all_input_nodes for s in produced.get(node, ())}
    values, index, fixed = _lifetimes(recorder, len(nodes), escaping, _mutated_inputs(captured))
    largest = max((storage.bytes for storage in recorder.all), default=0)
    fixed.append(Fixed(0, recorder.position - 1, recorder.device.slack_bytes(largest)))
    scratch = workspace_bytes if recorder.device.is_here else scratch_bytes
    forward = []
    for position, node in enumerate(nodes):
        own = tuple(index[id(s)] for s in produced[node] if id(s) in index and s.born == position)
        cost, call = costs[position]
        op = Op(node.name, _time_us(times, call, cost), scratch(call))
        if own:
            reads = {index[id(s)] for source in recompute_inputs(node) for s in produced.get(source, ()) if id(s) in index}
            state = _rng_state_bytes(recorder.device) if is_random(node) else 0
            launch = recorder.device.recompute_launch_us
            op = op._replace(inputs=tuple(sorted(reads)), outputs=own, launch_us=launch, state_bytes=state)
        forward.append(op)
    backward = tuple(Op(k.name, _time_us(times, k.call, k.cost_us), scratch(k.call), origin=k.origin) for k in recorder.kernels)
    moments = tuple(sorted((ready, nodes[position].name) for position, ready in recorder.gradient_ready.items()))
    return Program(
        tuple(forward),
        backward,
        tuple(values),
        tuple(fixed),
        sum(resident.values()),
        moments,
        recorder.device.link,
        resident=tuple(resident.items()),
        modules=tuple(module_path(node) for node in nodes),
    )


def _lifetimes(
    recorder: _Recorder, n_forward: int, escaping: set[int], mutated: frozenset[fx.Node]
) -> tuple[list[Value], dict[int, int], list[Fixed]]:
    """What the ops of forward make, the index of each by the id of its storage, and everything else that was allocated."""
    end = recorder.position - 1
    values: list[Value] = []
    index: dict[int, int] = {}
    fixed: list[Fixed] = []
    for storage in recorder.all:
        born = storage.born
        dies = end if storage.dies < 0 else storage.dies
        if storage.node is None or born >= n_forward:
            fixed.append(Fixed(born, max(dies, born), storage.bytes, _kind(storage, n_forward)))
            continue
        held = id(storage) in escaping
        last_forward = end if held else max(storage.last_forward, born)
        reads = tuple(sorted(set(storage.reads)))
        pin = HELD if held else why_pinned(storage.node, mutated)
        index[id(storage)] = len(values)
        values.append(Value(storage.node.name, storage.bytes, born, last_forward, reads, storage.release, pin))
    return values, index, fixed


def _kind(storage: _Storage, n_forward: int) -> str:
    """What a storage is for that is not an op's result in forward."""
    if storage.born >= n_forward:
        return "working set" if storage.dies >= 0 else "gradients"
    return "activations" if storage.packed else "working set"


def _time_us(times: OpTimes | None, call: Call | None, estimate_us: float) -> float:
    return estimate_us if times is None or call is None else times.time_us(call, estimate_us)


def _rng_state_bytes(device: DeviceProfile) -> int:
    """What the runtime keeps to replay a random op: the Mersenne twister's state; a GPU's lies in host memory."""
    return 0 if device.is_gpu else torch.get_rng_state().nbytes


def _mutated_inputs(captured: Captured) -> frozenset[fx.Node]:
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    targets = {source for _, source in captured.mutations}
    return frozenset(n for n, source in zip(placeholders, captured.sources, strict=True) if source in targets)
