"""The `forward` of a model that trains within a budget in place, rewritten block by block."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from remat import _torch
from remat.assembly import runnable
from remat.blocks import check_blockwise, trace_blocks
from remat.captured import Captured
from remat.enabled import Enabled, take_back, uncompiled
from remat.errors import RematError, telling_of_gradients
from remat.export import say_without_cache, without_cache
from remat.plan import Plan
from remat.ranks import agreed
from remat.settings import Settings
from remat.sharding import local_parameters
from remat.state import CallKey, call_key, device_type, flatten_call, keep, leaves_difference, leaves_key, used
from remat.table import announce
from remat.whole import check_training

_as_it_was: ContextVar[bool] = ContextVar("_as_it_was", default=False)  # whether a model runs its own forward, blocks too


class _BlockRun(NamedTuple):
    """What a block runs when it is called in the way of `key`; None: its own forward."""

    key: Any
    captured: Captured | None
    run: fx.GraphModule | None

    def fits(self, block: nn.Module) -> bool:
        return self.captured is None or self.captured.fits(block)


class _Variant(NamedTuple):
    """One kind of call of the model; of each block its calls, in order."""

    key: CallKey
    modules: tuple[nn.Module, ...]
    adds: bool
    first: tuple[str, Any]  # the path of the block that is called first, and how
    plan: Plan
    runs: Mapping[str, list[_BlockRun]]


class _Call(threading.local):
    """The model's call that runs now on this thread: its arguments, and what each block has still to run, once it is known."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    runs: Mapping[str, Iterator[_BlockRun]] | None = None


class EnabledBlocks(Enabled):
    """The model's own forward, in which each block, of which `paths` are the paths, runs its rewritten graph."""

    def __init__(self, model: nn.Module, settings: Settings, paths: Sequence[str]) -> None:
        super().__init__(model, settings)
        self.forwards = {path: _Block(self, path) for path in paths}

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by their paths."""
        return {path: self.model.get_submodule(path) for path in self.forwards}

    @property
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        """Those of the first call of each block."""
        latest = next((variant for variant in self._variants if variant.plan is self.plan), None)
        first = {path: runs[0].run for path, runs in latest.runs.items() if runs} if latest is not None else {}
        return {path: run for path, run in first.items() if run is not None}

    @cached_property
    def _baked(self) -> tuple[nn.Module, ...]:
        """The modules that are in graphs; what is between blocks runs as it is."""
        return tuple(module for block in self.blocks.values() for module in block.modules())

    def install(self) -> None:
        super().install()
        for path, block in self.blocks.items():
            block.forward = self.forwards[path]

    def __reduce__(self) -> Any:
        return type(self), (self.model, self.settings, tuple(self.forwards))

    def replan(self, settings: Settings) -> None:
        check_blockwise(settings)
        super().replan(settings)
        self._variants: list[_Variant] = []
        self._choosing = threading.RLock()
        self._call = _Call()
        self.plan = None

    def remove(self) -> None:
        super().remove()
        for path, forward in self.forwards.items():
            take_back(self.blocks[path], forward)

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call
        outer = call.arguments, call.runs  # of one that calls the model within
        call.arguments, call.runs = (args, kwargs), None
        if not self._variants:
            say_without_cache(self.model)
        try:
            with without_cache(self.model):
                return type(self.model).forward(self.model, *args, **kwargs)
        finally:
            call.arguments, call.runs = outer

    def as_it_was(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = _as_it_was.set(True)
        try:
            return super().as_it_was(args, kwargs)
        finally:
            _as_it_was.reset(token)

    def run_of(self, path: str, flat: list[Any], spec: Any) -> _BlockRun:
        """What the block at `path` has to run, now that it is called. The first call of a step decides which of the plans that
        serve the model's inputs goes on: their values may have a say in how blocks are called (a mask that is left out)."""
        name = f"{path} of {type(self.model).__name__}"
        now = self._call
        if now.arguments is None:
            raise RematError(
                f"{name} was called outside of the model's forward, for which it is planned, or on a thread that forward "
                "started, which planning does not follow; call the model, and let it call its blocks on its own thread"
            )
        called = leaves_key(flat, spec)
        if now.runs is None:
            with self._choosing:
                variant = self._variant(*now.arguments, first=(path, called))
            now.runs = {path: iter(runs) for path, runs in variant.runs.items()}
        planned = next(now.runs[path], None)
        if planned is None or planned.key != called:
            why = "more often" if planned is None else f"with {leaves_difference(called, planned.key)}"
            raise RematError(f"{name} was called otherwise than when this step was planned: {why}")
        return planned

    def _variant(self, args: tuple[Any, ...], kwargs: dict[str, Any], first: tuple[str, Any]) -> _Variant:
        """The one that serves this call, captured now if there is none."""
        key, adds = self._key(*flatten_call(args, kwargs))
        alike = (v for v in self._variants if v.key == key and v.adds == adds and v.first == first)
        serve = (v for v in alike if all(run.fits(self.blocks[p]) for p, runs in v.runs.items() for run in runs))
        variant = next(serve, None) or self.capture(args, kwargs)
        used(self._variants, variant)
        self.plan = variant.plan
        return variant

    def capture_together(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`capture` on every rank of those that share the model's parameters; an error on one is raised on all."""
        groups = _torch.sharded_groups(self.model)
        if not groups:
            self.capture(args, kwargs)
            return
        agreed(lambda: self.capture(args, kwargs).plan, groups[0].process_group)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Variant:
        """Plan for calls like this one."""
        check_training(self.model)
        flat, spec = flatten_call(args, kwargs)
        _, adds = self._key(flat, spec)
        traced = trace_blocks(self.model, args, kwargs, self.blocks, self.settings)
        with telling_of_gradients(adds):
            plan = traced.plan(self.settings)
        runs: dict[str, list[_BlockRun]] = {path: [] for path in self.blocks}
        for call, outer, regions in traced.rewritten(plan):
            run = None
            if call.captured is not None and outer is not None:
                run = runnable(self.blocks[call.path], call.captured, outer, regions)
            runs[call.path].append(_BlockRun(call.way, call.captured, run))
        first, (key, _) = traced.calls[0], self._key(flat, spec)
        variant = _Variant(key, self._baked, adds, (first.path, first.way), plan, runs)
        keep(self._variants, variant, type(self.model).__name__)
        self.plan = plan
        announce(plan)
        return variant

    def _key(self, flat: list[Any], spec: Any) -> tuple[CallKey, bool]:
        groups = _torch.sharded_groups(self.model)
        parameters = local_parameters(self.model, groups)
        sharding = tuple((g.ranks, g.reshards, g.input_dtype, g.output_dtype, g.reduce_dtype) for g in groups)
        modes = tuple(m.training for m in self.model.modules())
        tensors = (*parameters, *self.model.buffers())
        key = call_key(flat, spec, device_type(self.model), self._baked, tensors)._replace(others=(modes, sharding))
        return key, any(p.grad is not None for p in parameters)


class _Block:
    """The `forward` of one block."""

    def __init__(self, owner: EnabledBlocks, path: str) -> None:
        self.owner, self.path = owner, path

    @property
    def __signature__(self) -> inspect.Signature:
        block = self.owner.blocks[self.path]
        return inspect.signature(type(block).forward.__get__(block))

    def __reduce__(self) -> Any:
        return _forward_of, (self.owner, self.path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, block = self.owner, self.owner.blocks[self.path]
        if not owner.is_on or _as_it_was.get() or not owner.model.training or not torch.is_grad_enabled():
            return type(block).forward(block, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(self, args, kwargs)
        flat, spec = flatten_call(args, kwargs)
        planned = owner.run_of(self.path, flat, spec)
        if planned.run is None or planned.captured is None:
            return type(block).forward(block, *args, **kwargs)
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        with torch.autocast(device_type(owner.model), enabled=False):
            return planned.captured.output_of(planned.run(*tensors))


def _forward_of(owner: EnabledBlocks, path: str) -> _Block:
    return owner.forwards[path]
