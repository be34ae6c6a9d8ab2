"""The memory that Inductor's wrapper code allocates, read off its lines while they are generated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from remat import _torch
from remat._torch import V, inductor_ir, wrapper_code
from remat.devices import cuda_block_bytes
from remat.ops import OFFLOAD, RELEASE, RELOAD, WAIT
from remat.passes.aliasing import storage_bytes
from remat.workspace import Call, TensorLike, workspace_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that generated code allocates: at its peak, in what it takes over from forward, and in what it returns.

    Counted are inputs that are not parameters, intermediates, outputs, and the scratch memory of foreign kernels.
    """

    peak_bytes: int
    taken_bytes: int
    returned_bytes: int
    copied: tuple[str, ...] = ()  # parameters and inputs that forward returns in another layout, as memory of its own


def memory_of_inputs(module: fx.GraphModule) -> Memory:
    """That of a graph without ops."""
    placeholders = module.graph.find_nodes(op="placeholder")
    sizes = {node.name: storage_bytes(node.meta["val"]) for node in placeholders if not _is_resident(node.name)}
    return Memory(sum(sizes.values()), sum(size for name, size in sizes.items() if not name.startswith("tangents")), 0)


def _is_resident(name: str) -> bool:
    """True for inputs that are parameters, buffers and the caller's own tensors, or random state."""
    return name.startswith(("primals", "fwd_rng", "bwd_rng"))


class _Heap:
    """Names and the storages they stand for: a storage is freed with the last of its names."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._storage: dict[str, str] = {}
        self._bytes: dict[str, int] = {}
        self._names: Counter[str] = Counter()

    def allocate(self, name: str, size: int) -> None:
        self._storage[name], self._bytes[name], self._names[name] = name, size, 1
        self.live += size
        self.touch(0)

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
            self.live -= self._bytes[storage]

    def bytes_of(self, names: Iterable[str]) -> int:
        return sum(self._bytes[storage] for storage in {self._storage[name] for name in names if name in self._storage})

    def touch(self, scratch: int) -> None:
        self.peak = max(self.peak, self.live + scratch)


def run_allocations(
    lines: Sequence[Any], kept: frozenset[str], copied: frozenset[str], hosted: frozenset[str], names: Sequence[str]
) -> Memory:
    """Run the allocations of a graph's wrapper code. `names` are those of its results, `hosted` inputs on the host."""
    heap = _Heap()
    items: dict[str, list[Any]] = {}  # of the kernels with several results
    for line in lines:
        if isinstance(line, wrapper_code.MultiOutputLine):
            items.setdefault(line.arg_name, []).append(V.graph.get_buffer(line.result_name))
    coming = {n: _allocated_bytes(v) for n, v in V.graph.graph_inputs.items() if n in copied or not _is_resident(n)}
    coming = {name: size for name, size in coming.items() if name not in hosted}
    taken = sum(size for name, size in coming.items() if not name.startswith("tangents"))
    for name, size in coming.items():
        heap.allocate(name, size)
    for line in lines:
        if isinstance(line, wrapper_code.AllocateLine):
            heap.allocate(line.node.get_name(), _allocated_bytes(line.node))
        elif isinstance(line, wrapper_code.ReuseLine):
            heap.alias(line.reused_as.get_name(), line.node.get_name())
            if line.delete_old:
                heap.free(line.node.get_name())
        elif isinstance(line, wrapper_code.ReinterpretLine):
            heap.alias(line.reused_as.get_name(), line.node.get_name())
        elif isinstance(line, wrapper_code.FreeIfNotReusedLine | wrapper_code.FreeLine):
            if not getattr(line, "is_reused", False) and line.node.get_name() not in kept:
                heap.free(line.node.get_name())
        elif isinstance(line, wrapper_code.ExternKernelOutLine):
            heap.touch(_scratch_bytes(line.node))
        elif isinstance(line, wrapper_code.ExternKernelAllocLine):
            op = getattr(line.node, "op_overload", None)
            if op in (RELEASE, WAIT):
                continue
            several = isinstance(line.node.get_output_spec(), inductor_ir.MultiOutputLayout)
            for buffer in items.get(line.node.get_name(), ()) if several else (line.node,):
                shared = buffer.get_inputs_that_alias_output()
                if shared:
                    heap.alias(buffer.get_name(), shared[0])
                else:
                    heap.allocate(buffer.get_name(), 0 if op is OFFLOAD else _allocated_bytes(buffer))
            heap.touch(_scratch_bytes(line.node))
    returned = V.graph.get_output_names()
    pairs = zip(names, returned, strict=True)
    fresh = tuple(name for name, buffer in pairs if _is_resident(name) and heap.bytes_of([buffer]))
    return Memory(heap.peak, taken, heap.bytes_of(returned), fresh)


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
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, TensorLike)]
    if len(tensors) == len(kernel.inputs):
        buffers = iter(kernel.inputs)
        leaves = tuple(_restrided(leaf, next(buffers)) if isinstance(leaf, TensorLike) else leaf for leaf in call.leaves)
        call = dataclasses.replace(call, leaves=leaves)
    return workspace_bytes(call)


def _restrided(tensor: TensorLike, buffer: Any) -> TensorLike:
    stride = _torch.buffer_strides(buffer)
    return dataclasses.replace(tensor, stride=stride) if stride and len(stride) == len(tensor.shape) else tensor
