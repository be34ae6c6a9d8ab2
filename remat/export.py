"""A model as an exported program: with what runs eagerly, and without what training does not need."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from remat import _torch, patches
from remat._torch import pytree
from remat.errors import CaptureError, RewriteError, find_cause, reason_of
from remat.host_draws import noting_host_draws
from remat.kept import KeptTensor, kept_as_before
from remat.opaque import AVERAGES, CHECKPOINTS, GRADIENTS, OpaqueAutograd, say_changed, watch_for_opaque_autograd
from remat.twin import Twin

log = logging.getLogger("remat")

DOOR_2 = 'torch.compile(model, backend="remat", options={"budget": ...}) handles this'
_OURS = (Path(torch.__file__).parent, Path(__file__).parent, Path(contextlib.__file__))
_UNKNOWN = "an unknown line"
_without = Counter[int]()  # by configuration, how many calls run without a cache now, on whichever thread
_switching = threading.Lock()
_ASSIGNED = r"The tensor attributes? .* assigned during export"  # one that matters is an error: OpaqueAutograd


@patches.quiet_trials()
@patches.grad_modes_in_autocast()
@patches.keeping_attributes()
@patches.buffers_registered_as_before()
def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.export.ExportedProgram, set[str]]:
    """The model as it runs eagerly; where that cannot be exported, as its libraries would have it exported. And the names of
    buffers that its forward assigns to."""
    say_without_cache(model)
    own = _torch.fake_modes((*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))))
    errors: list[Exception] = []
    for way in (patches.specializing(_single_sequences(model, args, kwargs)), contextlib.nullcontext()):
        try:
            with (
                kept_as_before(model, (args, kwargs), DOOR_2) as changed,
                watch_for_opaque_autograd(model) as assigned,
                noting_host_draws(model) as draws,
                way,
                without_cache(model),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", _ASSIGNED)
                exported = torch.export.export(model, args, kwargs, strict=False)
            if _torch.fake_modes(exported.constants.values()) - own:  # export does not look where inputs are fake
                raise CaptureError("an intermediate result became a constant")
            if draws:
                raise CaptureError("a random number of Python's or NumPy's became a constant; draw it with torch")
            if changed:
                say_changed(type(model).__name__, tuple(dict.fromkeys(changed)))
            return exported, assigned
        except KeptTensor:
            raise
        except Exception as error:  # export raises many types, none of them documented
            cause = find_cause(error, OpaqueAutograd)
            if cause is not None:
                raise CaptureError(_opaque_message(cause.what, _user_line(error))) from error
            log.debug("%s: cannot be exported as it is: %s", type(model).__name__, error)
            errors.append(error)
    raise CaptureError(
        f"{reason_of(errors[0])}\n  at {_user_line(errors[0])}\n"
        f"  If the model alone runs on this input, one graph cannot hold it; {DOOR_2}"
    ) from errors[0]


def _single_sequences(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool]:
    """For each time that transformers looks whether a row's positions are of several sequences, True where they follow from no
    input, and are of one. Found in a run on fake tensors; what that does not reach counts as False."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    looked = getattr(masks, "find_packed_sequence_indices", None)
    found: list[bool] = []
    if looked is None or not any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        return found

    def look(position_ids: torch.Tensor) -> torch.Tensor | None:
        packed: torch.Tensor | None = looked(position_ids)
        found.append(packed is None)
        return packed

    twin = Twin(model)
    args, kwargs = pytree.tree_map_only(torch.Tensor, twin.like, (args, kwargs))
    looking = mock.patch.object(masks, "find_packed_sequence_indices", patches.here(look, looked))
    try:
        kept = kept_as_before(model, (args, kwargs), DOOR_2)
        with kept, looking, torch.no_grad(), twin.running(), without_cache(model):
            twin.module(*args, **kwargs)
    except Exception as error:  # of any kind: a model may do what fake tensors cannot
        log.debug("%s: looks at positions are known up to an error: %s", type(model).__name__, error)
    return found


@contextlib.contextmanager
def as_in_training() -> Iterator[None]:
    """Trace with grad and op by op, whatever holds around the call, and keep what tracing saves from saved-tensor hooks there:
    from `torch.utils.checkpoint`, which counts it, and from `save_on_cpu`."""
    if _torch.in_functorch():
        raise RewriteError("a call of a new kind cannot be planned in a torch.func transform; transform the original module")
    hooks = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    with torch.inference_mode(False), torch.enable_grad(), hooks, patches.interpreting_scripts():
        yield


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Leave a generation cache (transformers: `config.use_cache`) out of the training step: nothing there reads it."""
    with _switching:
        configs = [config for config in _configs(model) if config.use_cache or id(config) in _without]
        _without.update(map(id, configs))
        for config in configs:
            config.use_cache = False
    try:
        yield
    finally:
        with _switching:
            _without.subtract(map(id, configs))
            for config in configs:
                if not _without[id(config)]:
                    del _without[id(config)]
                    config.use_cache = True


def say_without_cache(model: nn.Module) -> None:
    """Say so if there is a cache to leave out."""
    if any(config.use_cache for config in _configs(model)):
        log.info("%s: the key-value cache is left out of training steps", type(model).__name__)


def _configs(model: nn.Module) -> list[Any]:
    """Those that say whether there is a cache."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    return list({id(c): c for c in found if isinstance(getattr(c, "use_cache", None), bool)}.values())


def _opaque_message(what: str, line: str) -> str:
    if what == CHECKPOINTS:
        return (
            f"the model already {what}, which remat replaces; turn it off first "
            "(transformers: model.activation_checkpointing_disable(), gradient_checkpointing_disable() before 5.23)"
        )
    if what == AVERAGES:
        return f"the model {what}, which no graph does; give it a momentum"
    place = f" ({line})" if line != _UNKNOWN else ""
    if what == GRADIENTS:
        return f"the model {what}{place}, for which there is no plan; without create_graph, {DOOR_2}"
    return f"the model {what}, which an exported graph does not keep{place}; {DOOR_2}"


def _user_line(error: BaseException) -> str:
    """The last line of a traceback that is neither torch's nor ours, nor of `contextlib`."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame for frame in frames if not frame.filename.startswith("<")]  # what torch generates
    theirs = [frame for frame in files if not any(map(Path(frame.filename).is_relative_to, _OURS))]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: {theirs[-1].line}" if theirs else _UNKNOWN
