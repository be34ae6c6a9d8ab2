"""The module that `remat.optimize` returns: it runs rewritten graphs and otherwise behaves as the module it came from.

It shares the original's parameters, buffers and submodules (the same objects under the same names), its signature, its
output type and its other attributes. For each kind of call (shapes, dtypes, constants, autocast, which parameters train) it
captures and plans once, and plans once more for a step that adds to gradients. In `eval()` or without grad it runs the original
forward, since there is nothing to save.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from remat._torch import pytree
from remat.capture import Captured
from remat.errors import BudgetError, RematError
from remat.passes.aliasing import is_view
from remat.passes.regions import RegionGraph
from remat.passes.transfers import is_mark, without_transfers
from remat.plan import Plan
from remat.runtime import one_step, run_region
from remat.steps import compile_region
from remat.table import announce

log = logging.getLogger("remat")
ADDS = "Gradients are there already, to which this step adds."
aten = torch.ops.aten


class Region(fx.GraphModule):
    """A checkpoint region: `runtime.run_region` in eager, `torch.utils.checkpoint` under torch.compile (AOT honours it)."""

    def __init__(self, region: RegionGraph) -> None:
        self.region_name = region.name
        super().__init__({}, region.graph, "Region")
        self.region_name = region.name
        self.dropped = region.dropped
        self.program = compile_region(region.graph, region.dropped, region.repeats)
        self.saved = _saved_calls(region)
        self.body = fx.GraphModule({}, without_transfers(region.graph))

    def recompile(self) -> Any:
        return _recompile_text_only(self)

    def forward(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _checkpointed(self, inputs)
        if not torch.is_grad_enabled():
            return self.body(*inputs)
        return run_region(self.program, inputs)


def _checkpointed(region: Region, inputs: tuple[Any, ...]) -> Any:
    contexts = functools.partial(_selective_contexts, region.saved)
    return checkpoint(region.body, *inputs, use_reentrant=False, context_fn=contexts)


def _selective_contexts(saved: frozenset[tuple[str, int]]) -> Any:
    """Contexts for `checkpoint` that save the given calls, as (op, how many of that op ran before), and recompute the rest."""
    seen: Counter[tuple[bool, str]] = Counter()

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        call = (context.is_recompute, str(op))
        seen[call] += 1
        keep = (str(op), seen[call] - 1) in saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _saved_calls(region: RegionGraph) -> frozenset[tuple[str, int]]:
    seen: Counter[str] = Counter()
    saved = set()
    for node in region.graph.nodes:
        if node.op == "call_function" and not is_mark(node):
            if node.name not in region.dropped and not is_view(node):
                saved.add((str(node.target), seen[str(node.target)]))
            seen[str(node.target)] += 1
    return frozenset(saved)


def _recompile_text_only(module: fx.GraphModule) -> Any:
    """GraphModule.recompile without installing the generated forward: `.code` and `print_readable` show it."""
    code = module._graph.python_code(root_module="self")
    module._code = code.src
    module._lineno_map = code._lineno_map
    module._prologue_start = code._prologue_start
    return code


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """A call's leaves and their structure; keyword arguments in order of name."""
    return pytree.tree_flatten((args, {name: kwargs[name] for name in sorted(kwargs)}))


def leaves_key(flat: list[Any], spec: Any) -> Any:
    """Equal for calls that a graph cannot tell apart."""
    leaves = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in flat
    )
    return spec, leaves


def call_key(model: nn.Module, flat: list[Any], spec: Any) -> Any:
    """Equal for calls of a model that one plan serves."""
    device = device_type(model)
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    trains = tuple(p.requires_grad for p in model.parameters())
    modes = tuple(m.training for m in model.modules())
    return leaves_key(flat, spec), autocast, trains, modes


def adopt(owner: nn.Module, original: nn.Module) -> None:
    """Give `owner` the original's parameters, buffers and submodules: the same objects, by the same names."""
    owner._parameters = original._parameters
    owner._buffers = original._buffers
    owner._non_persistent_buffers_set = original._non_persistent_buffers_set
    owner._state_dict_hooks = original._state_dict_hooks
    owner._load_state_dict_pre_hooks = original._load_state_dict_pre_hooks
    for name, child in original._modules.items():
        owner._modules[name] = child


@dataclass(frozen=True)
class Variant:
    """One rewritten graph: `run` takes the flat tensor inputs, and serves calls whose key is `key`. `adds` says whether
    gradients were there already, to which the step adds its own: that takes another plan."""

    key: Any
    adds: bool
    captured: Captured
    plan: Plan
    outer: fx.Graph
    regions: tuple[RegionGraph, ...]
    run: fx.GraphModule


class Build(Protocol):
    """Captures, plans and rewrites one kind of call; `captured` is what such a call was captured as before, if it was."""

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured | None
    ) -> tuple[Captured, Plan, fx.Graph, tuple[RegionGraph, ...]]: ...


class RematModule(fx.GraphModule):
    """See the module's docstring. `plan` is the plan of the latest kind of call, None before the first."""

    def __init__(self, original: nn.Module, build: Build, quiet: bool = False) -> None:
        super().__init__(nn.Module(), fx.Graph(), f"Remat{type(original).__name__}")
        self.__dict__["_original"] = original
        self.__dict__["_build"] = build
        self.__dict__["_variants"] = []
        self.plan: Plan | None = None
        self._said: set[str] = {"again"} if quiet else set()
        adopt(self, original)
        self.training = original.training
        signature = inspect.signature(original.forward)
        type(self).forward = _with_signature(type(self).forward, signature)  # type: ignore[method-assign]

    def recompile(self) -> Any:
        return _recompile_text_only(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled():
            self._say("eval", "runs the original forward in eval mode and without grad: nothing is saved there")
            return self._original(*args, **kwargs)
        flat, spec = flatten_call(args, kwargs)
        variant = self._find(flat, spec)
        if variant is None:
            variant = self.capture(args, kwargs)
        elif variant.plan is not self.plan and not torch.compiler.is_compiling():
            self._show(variant)
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        moves = len(variant.plan.transfers) > 0
        if moves and torch.compiler.is_compiling():
            raise RematError("a plan that offloads runs eagerly; compile the original model with backend='remat' instead")
        with torch.autocast(device_type(self), enabled=False), one_step() if moves else contextlib.nullcontext():
            results = variant.run(*tensors)
        return variant.captured.output_of(results)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """Capture and plan for calls like this one. `optimize` does it ahead when given example inputs."""
        if torch.compiler.is_compiling():
            raise RematError("this module has not captured a call like this; call it once before torch.compile")
        if self._variants:
            self._say("again", "plans again: the inputs differ from those before, or there are gradients to add to")
        inspect.signature(self._original.forward).bind(*args, **kwargs)  # a wrong call is a TypeError, as it always was
        key = call_key(self._original, *flatten_call(args, kwargs))
        known = next((variant.captured for variant in self._variants if variant.key == key), None)
        try:
            captured, plan, outer, regions = self._build(self._original, args, kwargs, known)
        except BudgetError as error:
            if self._adds():
                error.args = (f"{error} {ADDS}",)
            raise
        run = runnable(self._original, captured, outer, regions)
        variant = Variant(key, self._adds(), captured, plan, outer, regions, run)
        self._variants.append(variant)
        self._show(variant)
        announce(variant.plan)
        return variant

    def _show(self, variant: Variant) -> None:
        for name in [name for name in self._modules if name.startswith("region_")]:
            del self._modules[name]
        for name, child in variant.run._modules.items():
            if isinstance(child, Region):
                self._modules[name] = child
        self.plan = variant.plan
        self.graph = variant.run.graph

    def _find(self, flat: list[Any], spec: Any) -> Variant | None:
        key, adds = call_key(self._original, flat, spec), self._adds()
        return next((variant for variant in self._variants if variant.key == key and variant.adds == adds), None)

    def _adds(self) -> bool:
        return any(p.grad is not None for p in self._original.parameters())

    def _say(self, topic: str, message: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            log.info("%s %s", type(self._original).__name__, message)

    def train(self, mode: bool = True) -> RematModule:
        self._original.train(mode)
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RematModule:
        twin = RematModule(copy.deepcopy(self._original, memo), self._build)
        memo[id(self)] = twin
        twin.__dict__["_forward_hooks"] = copy.deepcopy(self._forward_hooks, memo)
        for v in self._variants:
            run = runnable(twin._original, v.captured, v.outer, v.regions)
            twin._variants.append(Variant(v.key, v.adds, v.captured, v.plan, v.outer, v.regions, run))
        if twin._variants:
            twin._show(twin._variants[-1])
        return twin

    def __copy__(self) -> RematModule:
        return RematModule(self._original, self._build)

    def __reduce__(self) -> Any:
        """Pickled as the original module and how to plan; the graph is captured again at the first call."""
        return _unpickle, (self._original, self._build, self.plan)


def _unpickle(original: nn.Module, build: Build, plan: Plan | None) -> RematModule:
    module = RematModule(original, build)
    module.plan = plan
    return module


def _with_signature(forward: Any, signature: inspect.Signature) -> Any:
    @functools.wraps(forward)
    def wrapped(self: RematModule, *args: Any, **kwargs: Any) -> Any:
        return RematModule.forward(self, *args, **kwargs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped


def device_type(module: nn.Module) -> str:
    """Of the device that the model is on."""
    parameter = next(module.parameters(), None)
    return parameter.device.type if parameter is not None else "cpu"


def runnable(original: nn.Module, captured: Captured, outer: fx.Graph, regions: tuple[RegionGraph, ...]) -> fx.GraphModule:
    """The outer graph as a module over the flat tensor inputs: parameters are attributes, buffers are written back."""
    root = nn.Module()
    adopt(root, original)
    for region in regions:
        root._modules[region.name] = Region(region)
    root.__dict__.update(captured.constants)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(outer.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    by_input = sorted(
        (source.index, node) for node, source in zip(placeholders, captured.sources, strict=True) if source.kind == "input"
    )
    for _, node in by_input:
        copies[node] = graph.node_copy(node)
    for node, source in zip(placeholders, captured.sources, strict=True):
        if source.kind != "input":
            copies[node] = graph.get_attr(source.name)
            copies[node].meta.update(node.meta)
    sources = {source: node for node, source in zip(placeholders, captured.sources, strict=True)}
    for node in nodes:
        if node.op == "output":
            results = [copies[n] for n in node.args[0]]
            for index, source in captured.mutations:
                graph.call_function(aten.copy_.default, (copies[sources[source]], results[index]))
            graph.output(tuple(results))
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    runnable = fx.GraphModule(root, graph, "Step")
    adopt(runnable, original)
    runnable.__dict__.update(captured.constants)
    return runnable
