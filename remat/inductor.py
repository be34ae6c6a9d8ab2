"""Inductor behind door 2: compiling with our partition, and the memory that the code it generates will allocate.

Fusion decides which recompute costs memory, and no cost model is sure of it. So the allocations are read off the wrapper code
while it is generated, and kept in it as a comment: code that comes from Inductor's cache tells them too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from remat import _torch, patches
from remat._torch import V
from remat.errors import RematError
from remat.generated import GeneratedStep
from remat.inductor_fusion import LocalFusion, SparingFusion, can_wait
from remat.inductor_memory import Headroom, Memory, Surroundings, memory_of_inputs, run_allocations, subgraph_peak_bytes
from remat.ops import OFFLOAD, RELOAD
from remat.passes.aliasing import results


class _Partitioner(_torch.CustomPartitionerFn):
    """A partition function in the form that Inductor's configuration takes."""

    def __init__(self, split: Callable[..., Any], watch: Watch) -> None:
        self.split, self.watch = split, watch

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return self.split(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        """The partition shows in the halves, which are what is cached; the number goes up with `Memory`."""
        room = hashlib.sha256(repr(sorted(self.watch.room.items())).encode()).hexdigest()
        return f"remat.6.{room}"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partitioner:
        return self  # Inductor copies its whole configuration now and then

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.uuid(),)  # in the keys of Inductor's cache


@dataclass
class Watch:
    """What is learned of a training step while it is compiled: the memory of either half.

    `kept` names inputs of backward that somebody else holds; `room` is how many bytes more fusion may hold while nodes of
    backward run; `is_channels_last` says how forward runs its convolutions. As soon as backward is known, `check` is called,
    which may end the compilation with an error.
    """

    check: Callable[[], None]
    kept: frozenset[str] = frozenset()
    room: dict[str, int] = field(default_factory=dict)
    is_channels_last: bool = False
    forward: Memory | None = None
    backward: Memory | None = None

    def clear(self) -> None:
        self.forward = self.backward = None
        self.room.clear()

    def found(self, memory: Memory, is_backward: bool) -> None:
        if not is_backward:
            self.forward = memory
            return
        self.backward = memory
        self.check()

    @property
    def step(self) -> GeneratedStep:
        """Both halves as one; what is not known yet allocates nothing."""
        nothing = Memory(("",), ())
        return GeneratedStep(self.forward or nothing, self.backward or nothing, self.kept)


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], split: Callable[..., Any], watch: Watch, is_sparing: bool
) -> Callable[..., Any]:
    """Inductor with our partition, both halves at once. AOTAutograd's own cache is off: it would skip the partition, and with
    it the plan."""
    fusion = SparingFusion if is_sparing else LocalFusion

    def compile_half(module: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return _compile_half(module, inputs, watch, **kwargs)

    watch.clear()
    both = _torch.functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
    configured = {"inductor_choices_class": fusion, "custom_partitioner_fn": _Partitioner(split, watch)}
    choices = fusion(watch.room)
    handler = V.set_choices_handler(choices)  # the configured class is made only once in a process
    with both, handler, patches.adding_products(can_wait), patches.freeing_before(choices.is_full):
        return _torch.compile_fx(gm, inputs, compile_half, config_patches=configured)  # type: ignore[return-value]


def _compile_half(module: fx.GraphModule, inputs: Sequence[Any], watch: Watch, **kwargs: Any) -> Any:
    """Inductor's compilation of one graph. Where values leave, its order stays: Inductor's own search for the order with the
    smallest peak takes their copies on the host for device memory, and puts the copying off. Backward has the layout of
    forward: Inductor decides it by the convolutions that a graph runs, of which backward has those that it recomputes."""
    if kwargs.get("is_inference"):
        return _torch.compile_fx_inner(module, inputs, **kwargs)
    is_backward = bool(kwargs.get("is_backward"))
    if not is_backward:
        watch.is_channels_last = _torch.GraphLowering.decide_layout_opt(module, is_inference=False)
        _save_as_they_are(module)
    hosts = any(module.graph.find_nodes(op="call_function", target=op) for op in (OFFLOAD, RELOAD))
    ours = {"reorder_for_peak_memory": False} if hosts else {}
    if is_backward and watch.is_channels_last:
        ours["force_layout_optimization"] = True
    reading = _Reading(module, is_backward, watch)
    for config in (ours, {**ours, "fx_graph_cache": False}):
        _torch.forget_output_strides()
        with (
            _torch.inductor_config.patch(config),
            patches.reading_wrapper_code(reading.estimate, reading.read, reading.read_subgraph),
        ):
            code = _torch.compile_fx_inner(module, inputs, **kwargs)
        if not reading.is_done:
            reading.recall(getattr(code, "source_code", ""))
        if reading.is_done:
            return code
    if any(node.op == "call_function" for node in module.graph.nodes):
        raise RematError("the memory of Inductor's code cannot be read off it; use compiler='eager'")
    watch.found(memory_of_inputs(module), is_backward)  # without ops: Inductor does not compile it
    return code


def _save_as_they_are(forward: fx.GraphModule) -> None:
    """Have Inductor leave inputs that are saved, such as weights of convolutions, in their layout, as if the user saw them: it
    would keep copies with their channels last from forward to backward. Now backward makes its own."""
    output = forward.graph.output_node()
    inputs = [i for i, node in enumerate(results(forward.graph)) if isinstance(node, fx.Node) and node.op == "placeholder"]
    output.meta["user_visible_output_idxs"] = [*output.meta.get("user_visible_output_idxs", ()), *inputs]


class _Reading:
    """Reads a graph's memory off its wrapper code, and writes it into the code."""

    def __init__(self, module: fx.GraphModule, is_backward: bool, watch: Watch) -> None:
        names = [node.name if isinstance(node, fx.Node) else "" for node in results(module.graph)]
        hosted = frozenset(node.args[0].name for node in module.graph.find_nodes(op="call_function", target=RELOAD))
        kept = frozenset(watch.kept if is_backward else ())
        if is_backward and not _torch.TANGENTS_GO:
            tangents = (node.name for node in module.graph.find_nodes(op="placeholder"))
            kept |= {name for name in tangents if name.startswith("tangents")}
        self._around = Surroundings(kept, hosted, names, {})
        self._is_backward, self._watch = is_backward, watch
        self.is_done = False

    def estimate(self, lines: Sequence[Any]) -> Headroom:
        return Headroom(lines, self._around)

    def read(self, lines: Sequence[Any]) -> list[str]:
        """The comment to put into the code."""
        memory = run_allocations(lines, self._around)
        self._found(memory)
        return [_NOTE + json.dumps({"about": self._digest(), **dataclasses.asdict(memory)})]

    def read_subgraph(self, lines: Sequence[Any]) -> None:
        self._around.inside[V.graph.name] = subgraph_peak_bytes(lines, self._around.inside)

    def recall(self, source: str) -> None:
        """What the comment in code from Inductor's cache says, if that was compiled with the same inputs held elsewhere."""
        for line in source.splitlines():
            _, note, text = line.partition(_NOTE)
            found = json.loads(text) if note and line.startswith(("#", "//")) else {}
            if found.pop("about", None) == self._digest():
                self._found(Memory.read(found))
                return

    def _found(self, memory: Memory) -> None:
        self.is_done = True
        self._watch.found(memory, self._is_backward)

    def _digest(self) -> str:
        kept, hosted, names, _ = self._around
        return hashlib.sha256(repr((sorted(kept), sorted(hosted), names)).encode()).hexdigest()


_NOTE = "remat: "
