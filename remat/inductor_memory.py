"""The memory that Inductor's wrapper code allocates, read off its lines while they are generated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torch import fx

from remat import _torch
from remat._torch import V, inductor_ir, pytree, wrapper_code
from remat.devices import cuda_block_bytes
from remat.ops import OFFLOAD, RELEASE, RELOAD, WAIT
from remat.passes.aliasing import results, storage_bytes
from remat.workspace import Call, TensorLike, workspace_bytes


class Allocation(NamedTuple):
    """Memory from one moment to another, both included. `results` are those of the graph that it holds at its end."""

    name: str
    bytes: int
    born: int
    dies: int
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """What the generated code of a graph allocates, and when: at the start and, for each of `moments`, for that node.

    Counted are inputs that are not parameters, intermediates, outputs, and the scratch memory of foreign kernels. Inputs are
    there from moment 0, which has no node.
    """

    moments: tuple[str, ...]
    allocations: tuple[Allocation, ...]

    @property
    def live_bytes(self) -> list[int]:
        """What is allocated at each moment."""
        changes = [0] * (len(self.moments) + 1)
        for made in self.allocations:
            changes[made.born] += made.bytes
            changes[made.dies + 1] -= made.bytes
        return [*accumulate(changes[:-1])]

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Memory:
        """From what `dataclasses.asdict` made, written as JSON and read back."""
        allocations = tuple(
            Allocation(name, size, born, dies, tuple(results)) for name, size, born, dies, results in data["allocations"]
        )
        return cls(tuple(data["moments"]), allocations)


def memory_of_inputs(module: fx.GraphModule) -> Memory:
    """That of a graph without ops."""
    placeholders = module.graph.find_nodes(op="placeholder")
    returned = {node for node in results(module.graph) if isinstance(node, fx.Node)}
    return Memory(
        ("",),
        tuple(
            Allocation(node.name, storage_bytes(node.meta["val"]), 0, 0, (node.name,) if node in returned else ())
            for node in placeholders
            if not _is_resident(node.name)
        ),
    )


def _is_resident(name: str) -> bool:
    """True for inputs that are parameters, buffers and the caller's own tensors, or random state."""
    return name.startswith(("primals", "fwd_rng", "bwd_rng"))


class _Heap:
    """Names and the storages they stand for: a storage is freed with the last of its names."""

    def __init__(self) -> None:
        self.moments = [""]
        self._made: list[Allocation] = []
        self._storage: dict[str, int] = {}
        self._names: Counter[int] = Counter()

    def allocate(self, name: str, size: int, node: str) -> None:
        """At a moment of its own, unless for an input."""
        self._storage[name] = len(self._made)
        self._names[len(self._made)] = 1
        if node:
            self.moments.append(node)
        self._made.append(Allocation(node or name, size, len(self.moments) - 1, -1))

    def replace(self, old: str, name: str, size: int, node: str) -> None:
        """Allocate the memory of `old`, which has been held until now, as a buffer of another name."""
        storage = self._storage.get(old)
        if storage is None or self._names[storage] > 1:
            self.alias(name, old)
            self.free(old)
            return
        self.free(old)
        self.allocate(name, size, node)

    def alias(self, name: str, of: str) -> None:
        if of in self._storage:
            self._storage[name] = self._storage[of]
            self._names[self._storage[of]] += 1

    def free(self, name: str) -> None:
        storage = self._storage.pop(name, None)
        if storage is None:
            return
        self._names[storage] -= 1
        if not self._names[storage]:
            self._made[storage] = self._made[storage]._replace(dies=len(self.moments) - 1)

    def scratch(self, node: str, size: int) -> None:
        if size:
            self.moments.append(node)
            now = len(self.moments) - 1
            self._made.append(Allocation(f"scratch of {node}", size, now, now))

    def memory(self, names: Sequence[str], buffers: Sequence[str]) -> Memory:
        """All of it, when `buffers` are returned as the results called `names`."""
        known: dict[int, list[str]] = {}
        for name, buffer in zip(names, buffers, strict=True):
            if buffer in self._storage:
                known.setdefault(self._storage[buffer], []).append(name)
        end = len(self.moments) - 1
        made = [
            allocation._replace(dies=allocation.dies if allocation.dies >= 0 else end, results=tuple(known.get(i, ())))
            for i, allocation in enumerate(self._made)
        ]
        return Memory(tuple(self.moments), tuple(a for a in made if a.bytes))


class Surroundings(NamedTuple):
    """Of a graph: inputs that somebody else holds, inputs on the host, the names of its results, and what the graphs within it
    allocate at most."""

    kept: frozenset[str]
    hosted: frozenset[str]
    names: Sequence[str]
    inside: dict[str, int]


def run_allocations(lines: Sequence[Any], around: Surroundings) -> Memory:
    """Run the allocations of a graph's wrapper code."""
    heap, _ = _run(lines, around)
    return heap.memory(around.names, V.graph.get_output_names())


def subgraph_peak_bytes(lines: Sequence[Any], inside: dict[str, int]) -> int:
    """The most that a graph within a graph allocates, its results among it and its inputs not."""
    inputs = frozenset(V.graph.graph_inputs)
    memory = run_allocations(lines, Surroundings(inputs, inputs, V.graph.get_output_names(), inside))
    return max(memory.live_bytes)


class Headroom:
    """How far memory stays below its peak while a graph's wrapper code runs: a freed buffer may wait there for a later one of
    its size. In the form of Inductor's `EfficientPeakEstimate`, which does not know what else holds memory."""

    def __init__(self, lines: Sequence[Any], around: Surroundings) -> None:
        heap, self._moments = _run(lines, around)
        self._bytes = heap.memory(around.names, V.graph.get_output_names()).live_bytes
        self.overall_peak_memory = max(self._bytes)

    def peak_between(self, freed: Any, allocated: Any) -> int:
        return max((self._bytes[moment] for moment in self._between(freed, allocated)), default=0)

    def update_peak_between(self, freed: Any, allocated: Any) -> None:
        size = _allocated_bytes(allocated.node)
        for moment in self._between(freed, allocated):
            self._bytes[moment] += size

    def _between(self, freed: Any, allocated: Any) -> range:
        return range(self._moments[id(freed)] + 1, self._moments[id(allocated)])


def _run(lines: Sequence[Any], around: Surroundings) -> tuple[_Heap, dict[int, int]]:
    """All lines run, and by their identity the moment after each."""
    heap, moments = _Heap(), {}
    items: dict[str, list[Any]] = {}  # of the kernels with several results
    for line in lines:
        if isinstance(line, wrapper_code.MultiOutputLine):
            items.setdefault(line.arg_name, []).append(V.graph.get_buffer(line.result_name))
    for name, value in V.graph.graph_inputs.items():
        if not _is_resident(name) and name not in around.hosted:
            heap.allocate(name, _allocated_bytes(value), "")
    kernels = {line.node.get_name() for line in lines if isinstance(line, wrapper_code.ExternKernelAllocLine)}
    passed: list[str] | None = None  # while a graph within this one is called: what it is handed, and frees itself
    for line in lines:
        if isinstance(line, wrapper_code.EnterSubgraphLine):
            heap.scratch(line.graph.name, around.inside.get(line.graph.name, 0))
            passed = passed or []
        elif isinstance(line, wrapper_code.MultiOutputLine) and line.arg_name not in kernels:
            for name in passed or ():
                heap.free(name)
            passed = None
            _hold(heap, V.graph.get_buffer(line.result_name))
        elif isinstance(line, wrapper_code.AllocateLine):
            heap.allocate(line.node.get_name(), _allocated_bytes(line.node), _node_name(line.node))
        elif isinstance(line, wrapper_code.ReuseLine):
            if line.delete_old:
                size, node = _allocated_bytes(line.reused_as), _node_name(line.reused_as)
                heap.replace(line.node.get_name(), line.reused_as.get_name(), size, node)
            else:
                heap.alias(line.reused_as.get_name(), line.node.get_name())
        elif isinstance(line, wrapper_code.ReinterpretLine):
            heap.alias(line.reused_as.get_name(), line.node.get_name())
        elif isinstance(line, wrapper_code.FreeIfNotReusedLine | wrapper_code.FreeLine):
            name = line.node.get_name()
            if not getattr(line, "is_reused", False) and name not in around.kept:
                heap.free(name) if passed is None else passed.append(name)
        elif isinstance(line, wrapper_code.ExternKernelOutLine):
            heap.scratch(_node_name(line.node), _scratch_bytes(line.node))
        elif isinstance(line, wrapper_code.ExternKernelAllocLine):
            op = getattr(line.node, "op_overload", None)
            if op in (RELEASE, WAIT):
                continue
            several = isinstance(line.node.get_output_spec(), inductor_ir.MultiOutputLayout)
            for buffer in items.get(line.node.get_name(), ()) if several else (line.node,):
                _hold(heap, buffer, is_on_host=op is OFFLOAD)
            heap.scratch(_node_name(line.node), _scratch_bytes(line.node))
        moments[id(line)] = len(heap.moments) - 1
    return heap, moments


def _hold(heap: _Heap, buffer: Any, is_on_host: bool = False) -> None:
    """A result of a kernel that allocates its results itself, or gives back what it was given."""
    shared = buffer.get_inputs_that_alias_output()
    if shared:
        heap.alias(buffer.get_name(), shared[0])
    else:
        heap.allocate(buffer.get_name(), 0 if is_on_host else _allocated_bytes(buffer), _node_name(buffer))


def _node_name(buffer: Any) -> str:
    """The graph's node whose result a buffer holds, or one of those that it is computed for."""
    node = getattr(buffer, "fx_node", None) or buffer.get_origin_node() or next(reversed([*buffer.origins]), None)
    return node.name if node is not None else buffer.get_name()


def _allocated_bytes(buffer: Any) -> int:
    size = _torch.buffer_bytes(buffer)
    return cuda_block_bytes(size) if size and buffer.get_device().type == "cuda" else size


def _scratch_bytes(kernel: Any) -> int:
    """Scratch memory of a foreign kernel on inputs in the layout that Inductor gives them, which may not be the graph's."""
    node = getattr(kernel, "fx_node", None) or kernel.get_origin_node()
    if node is None or node.target in (OFFLOAD, RELEASE, RELOAD, WAIT):
        return 0
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, dict(node.kwargs)))
    call = Call.of(node.target, args, kwargs)
    if call is None:
        return 0
    if len(call.tensors) == len(kernel.inputs):
        buffers = iter(kernel.inputs)
        leaves = tuple(_restrided(leaf, next(buffers)) if isinstance(leaf, TensorLike) else leaf for leaf in call.leaves)
        call = dataclasses.replace(call, leaves=leaves)
    return workspace_bytes(call)


def _restrided(tensor: TensorLike, buffer: Any) -> TensorLike:
    stride = _torch.buffer_strides(buffer)
    return dataclasses.replace(tensor, stride=stride) if stride and len(stride) == len(tensor.shape) else tensor
