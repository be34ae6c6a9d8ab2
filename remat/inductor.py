"""Inductor behind door 2: compiling with our partition, and the memory that the code it generates will allocate.

Fusion decides which recompute costs memory, and no cost model is sure of it. So the allocations are read off the wrapper code
while it is generated, and kept in it as a comment: code that comes from Inductor's cache tells them too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from remat import _torch
from remat._torch import V, inductor_ir, wrapper_code
from remat.devices import cuda_block_bytes
from remat.errors import RematError
from remat.ops import OFFLOAD, RELEASE, RELOAD, WAIT
from remat.passes.aliasing import results, storage_bytes
from remat.workspace import Call, TensorLike, workspace_bytes

_FUSION_REACH = 10  # kernels


class LocalFusion(_torch.InductorChoices):
    """Inductor's fusion choices, without fusion of kernels that are far apart in running order.

    Horizontal ones share a read of some small table, vertical ones the result of a recomputed chain; either pulls the
    recompute of many layers to one moment, where all of it is held (`Scheduler.are_long_distant_nodes` says as much of its own
    threshold, which is more than a layer).
    """

    def uuid(self) -> str:
        return f"remat.LocalFusion.3.{_FUSION_REACH}"

    @staticmethod
    def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        distance = max(abs(node1.min_order - node2.max_order), abs(node2.min_order - node1.max_order))
        if distance > _FUSION_REACH:
            return False
        return _torch.InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)

    @staticmethod
    def can_fuse_vertical(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        return node2.min_order - node1.max_order <= _FUSION_REACH


# Without reuse a buffer is freed at once, not held for a later one of its size; the allocator keeps such blocks as cheaply.
_CONFIG: dict[str, Any] = {"inductor_choices_class": LocalFusion, "allow_buffer_reuse": False}


class _Partitioner(_torch.CustomPartitionerFn):
    """A partition function in the form that Inductor's configuration takes."""

    def __init__(self, split: Callable[..., Any]) -> None:
        self.split = split

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return self.split(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        return "remat"  # Inductor compiles the halves, in which the partition shows

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partitioner:
        return self  # Inductor copies its whole configuration now and then

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.uuid(),)  # in the keys of Inductor's cache


@dataclass(frozen=True)
class Memory:
    """Bytes that generated code allocates: at its peak, in what it takes over from forward, and in what it returns.

    Counted are inputs that are not parameters, intermediates, outputs, and the scratch memory of foreign kernels.
    """

    peak_bytes: int
    taken_bytes: int
    returned_bytes: int
    copied: tuple[str, ...] = ()  # parameters and inputs that forward returns in another layout, as memory of its own


@dataclass
class Watch:
    """What is learned of a training step while it is compiled: the memory of either half.

    `kept` names inputs of backward that somebody else holds. As soon as backward is known, `check` is called, which may end
    the compilation with an error.
    """

    check: Callable[[], None]
    kept: frozenset[str] = frozenset()
    forward: Memory | None = None
    backward: Memory | None = None

    def clear(self) -> None:
        self.forward = self.backward = None

    def found(self, memory: Memory, is_backward: bool) -> None:
        if not is_backward:
            self.forward = memory
            return
        self.backward = memory
        self.check()

    @property
    def peak_bytes(self) -> int:
        """Peak of either half above what is resident; the model's outputs are alive while backward runs."""
        first, second = self.forward, self.backward
        peaks = [first.peak_bytes] if first is not None else []
        if first is not None and second is not None:
            peaks.append(first.returned_bytes + second.peak_bytes - second.taken_bytes)
        return max(peaks, default=0)


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], split: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """Inductor with our partition, both halves at once. AOTAutograd's own cache is off: it would skip the partition, and with
    it the plan."""

    def compile_half(module: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return _compile_half(module, inputs, watch, **kwargs)

    watch.clear()
    both = _torch.functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
    with both, V.set_choices_handler(LocalFusion()):  # the configured class is made only once in a process
        patches = {**_CONFIG, "custom_partitioner_fn": _Partitioner(split)}
        return _torch.compile_fx(gm, inputs, compile_half, config_patches=patches)  # type: ignore[return-value]


def _compile_half(module: fx.GraphModule, inputs: Sequence[Any], watch: Watch, **kwargs: Any) -> Any:
    """Inductor's compilation of one graph. Where values leave, its order stays: Inductor's own search for the order with the
    smallest peak takes their copies on the host for device memory, and puts the copying off."""
    if kwargs.get("is_inference"):
        return _torch.compile_fx_inner(module, inputs, **kwargs)
    is_backward = bool(kwargs.get("is_backward"))
    reading = _Reading(module, is_backward, watch)
    hosts = any(module.graph.find_nodes(op="call_function", target=op) for op in (OFFLOAD, RELOAD))
    order = {"reorder_for_peak_memory": False} if hosts else {}
    for config in (order, {**order, "fx_graph_cache": False}):
        with _torch.inductor_config.patch(config), _torch.reading_wrapper_code(reading.read):
            code = _torch.compile_fx_inner(module, inputs, **kwargs)
        if not reading.is_done:
            reading.recall(getattr(code, "source_code", ""))
        if reading.is_done:
            return code
    if any(node.op == "call_function" for node in module.graph.nodes):
        raise RematError("the memory of Inductor's code cannot be read off it; use compiler='eager'")
    watch.found(_memory_of_inputs(module), is_backward)  # without ops: Inductor does not compile it
    return code


class _Reading:
    """Reads a graph's memory off its wrapper code, and writes it into the code."""

    def __init__(self, module: fx.GraphModule, is_backward: bool, watch: Watch) -> None:
        names = [node.name if isinstance(node, fx.Node) else "" for node in results(module.graph)]
        hosted = frozenset(node.args[0].name for node in module.graph.find_nodes(op="call_function", target=RELOAD))
        copied: frozenset[str] = frozenset()
        kept = frozenset(watch.kept if is_backward else ())
        if is_backward and not _torch.TANGENTS_GO:
            tangents = (node.name for node in module.graph.find_nodes(op="placeholder"))
            kept |= {name for name in tangents if name.startswith("tangents")}
        if is_backward and watch.forward is not None:
            copied = frozenset(watch.forward.copied)
        self._about = kept, copied, hosted, names
        self._is_backward, self._watch = is_backward, watch
        self.is_done = False

    def read(self, lines: Sequence[Any]) -> list[str]:
        """The comment to put into the code."""
        memory = _run_allocations(lines, *self._about)
        self._found(memory)
        return [_NOTE + json.dumps({"about": self._digest(), **dataclasses.asdict(memory)})]

    def recall(self, source: str) -> None:
        """What the comment in code from Inductor's cache says, if that was compiled with the same inputs held elsewhere."""
        for line in source.splitlines():
            _, note, text = line.partition(_NOTE)
            found = json.loads(text) if note and line.startswith(("#", "//")) else {}
            if found.pop("about", None) == self._digest():
                self._found(Memory(**{**found, "copied": tuple(found["copied"])}))
                return

    def _found(self, memory: Memory) -> None:
        self.is_done = True
        self._watch.found(memory, self._is_backward)

    def _digest(self) -> str:
        kept, copied, hosted, names = self._about
        return hashlib.sha256(repr((sorted(kept), sorted(copied), sorted(hosted), names)).encode()).hexdigest()


_NOTE = "remat: "


def _memory_of_inputs(module: fx.GraphModule) -> Memory:
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


def _run_allocations(
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
