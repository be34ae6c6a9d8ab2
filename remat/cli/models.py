"""What the command line plans for: a model on no device, with example inputs, from a few words. Nothing is downloaded.

MODEL is one of

- a folder with a `config.json` of `transformers`, or that file;
- an architecture of `transformers` by its name ("llama"), its sizes as `--set hidden_size=4096`;
- `timm:NAME`, where timm is installed;
- `package.module:function`, called with the options it takes; it returns a model and its inputs.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remat._torch import pytree
from remat.errors import RematError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("adamw", "adam", "sgd", "momentum", "adafactor", "none")
_BATCH, _SEQ = 1, 512  # where nothing is said
_POSITIONS = re.compile(r"position_emb|embed_positions|\bwpe$")
_HEADS = (  # of an architecture with several, the first of these
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Request:
    """What was asked for. `sizes` overwrite those of a configuration; None: as the model has it."""

    model: str
    batch: int | None = None
    seq: int | None = None
    dtype: str | None = None
    lora: str | None = None
    optimizer: str = "none"
    sizes: Sequence[str] = ()


@dataclass(frozen=True)
class Built:
    """A model in training mode, what to call it with, and its optimizer."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    optimizer: torch.optim.Optimizer | None


def build(request: Request) -> Built:
    """Build it on `meta`. Raises RematError when there is no such model, or an option does not apply to it."""
    if request.dtype is not None and request.dtype not in DTYPES:
        raise RematError(f"--dtype {request.dtype} is unknown; there are {', '.join(DTYPES)}")
    if request.optimizer not in OPTIMIZERS:
        raise RematError(f"--optimizer {request.optimizer} is unknown; there are {', '.join(OPTIMIZERS)}")
    for name, size in (("batch", request.batch), ("seq", request.seq)):
        if size is not None and size < 1:
            raise RematError(f"--{name} {size} must be at least 1")
    with torch.device("meta"):
        model, args, kwargs = _of_kind(request)
        if request.dtype is not None:
            model = model.to(DTYPES[request.dtype])
            args, kwargs = _cast(args, DTYPES[request.dtype]), _cast(kwargs, DTYPES[request.dtype])
        if request.lora is not None:
            model = _with_lora(model, request.lora)
        return Built(model.train(), args, kwargs, _optimizer(request.optimizer, model))


def _of_kind(request: Request) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    name, path = request.model, Path(request.model)
    if path.exists():
        return _from_config(_read_config(path, request.sizes), request)
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"), request)
    if ":" in name:
        return _from_function(name, request)
    return _from_config(_named_config(name, request.sizes), request)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RematError("configurations of transformers need it: pip install transformers") from error
    transformers.logging.set_verbosity_error()
    return transformers


def _read_config(path: Path, sizes: Sequence[str]) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RematError(f"{file} is no configuration: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise RematError(f'{file} is no configuration of transformers: it has no "model_type"')
    return _named_config(data.pop("model_type"), sizes, data)


def _named_config(name: str, sizes: Sequence[str], data: Mapping[str, Any] | None = None) -> Any:
    mapping = _transformers().CONFIG_MAPPING
    if name not in mapping:
        close = difflib.get_close_matches(name, mapping.keys(), n=5)
        raise RematError(
            f"there is no model {name!r}: no such file, and no architecture of transformers"
            + (f"; there are {', '.join(close)}" if close else "")
        )
    given = dict(_assignment(text) for text in sizes)
    known = mapping[name]()
    for key in given:
        if not hasattr(known, key):
            raise RematError(f"--set {key}: {type(known).__name__} has no such size")
    with _told(f"{type(known).__name__} does not take these sizes"):
        return mapping[name](**{**(data or {}), **given})


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RematError(f"--set {text}: write it as NAME=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _from_config(config: Any, request: Request) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformers = _transformers()
    if getattr(config, "use_cache", False):
        config.use_cache = False
    name = _class_name(config)
    made = getattr(transformers, name, None)
    if made is None:
        raise RematError(f"transformers {transformers.__version__} has no {name}")
    with _told(f"{name} does not take this configuration"):
        model = made(config)
    return model, (), _inputs(model, config, request)


def _class_name(config: Any) -> str:
    from transformers.models.auto import modeling_auto

    if getattr(config, "architectures", None):
        return str(config.architectures[0])
    found = (getattr(modeling_auto, head).get(config.model_type) for head in _HEADS)
    name = next((name for name in found if name is not None), None) or modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise RematError(f"remat does not know what to train of a {config.model_type!r}; use package.module:function")
    return str(name[0] if isinstance(name, list | tuple) else name)


def _inputs(model: nn.Module, config: Any, request: Request) -> dict[str, Any]:
    batch, main = request.batch or _BATCH, getattr(model, "main_input_name", "")
    accepts = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        if request.seq is not None:
            raise RematError("--seq: this model takes images; their size is --set image_size=...")
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        labels = {"labels": torch.zeros(batch, dtype=torch.long)} if "labels" in accepts else {}
        return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), height, width), **labels}
    if main != "input_ids":
        raise RematError(f"remat cannot make inputs called {main!r}; use package.module:function, which brings its own")
    learned = [m.num_embeddings for path, m in model.named_modules() if isinstance(m, nn.Embedding) and _POSITIONS.search(path)]
    length = request.seq or min(_SEQ, getattr(config, "max_position_embeddings", None) or _SEQ, *learned)
    if learned and length > min(learned):
        raise RematError(f"--seq {length}: this model has {min(learned)} positions")
    ids = torch.zeros(batch, length, dtype=torch.long)
    also = ["labels"] if "labels" in accepts else []
    also += ["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else []
    return dict.fromkeys(("input_ids", *also), ids)


def _from_timm(name: str, request: Request) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    try:
        import timm
    except ImportError as error:
        raise RematError("timm:NAME needs timm: pip install timm") from error
    except Exception as error:  # an installation that does not fit together
        raise RematError(f"timm cannot be imported: {_first_line(error)}") from error
    if request.seq is not None:
        raise RematError("--seq: this model takes images")
    with _told(f"timm does not make {name!r}"):
        model = timm.create_model(name, pretrained=False, **dict(_assignment(text) for text in request.sizes))
    return model, (torch.zeros(request.batch or _BATCH, *model.default_cfg["input_size"]),), {}


def _from_function(name: str, request: Request) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command runs in
    with _told(f"{name} cannot be imported"):
        function = getattr(importlib.import_module(module_name), function_name)
    if not callable(function):
        raise RematError(f"{name} is no function")
    options = {"batch": request.batch, "seq": request.seq, **dict(_assignment(text) for text in request.sizes)}
    options = {key: value for key, value in options.items() if value is not None}
    takes = inspect.signature(function).parameters
    for key in options:
        if key not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise RematError(f"{name} takes no {key!r}, so that it cannot be set from here")
    with _told(f"{name} failed"):
        found = function(**options)
    if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], nn.Module):
        raise RematError(f"{name} must return a model and its inputs: a dict, a tuple, or a tuple and a dict")
    parts = [part if isinstance(part, dict | tuple) else (part,) for part in found[1:]]
    args = next((part for part in parts if isinstance(part, tuple)), ())
    return found[0], args, next((part for part in parts if isinstance(part, dict)), {})


def _with_lora(model: nn.Module, text: str) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise RematError("--lora needs peft: pip install peft") from error
    options, _, targets = text.partition("targets=")
    given = dict(_assignment(part) for part in options.split(",") if part)
    names = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    for key in given:
        if key not in names:
            raise RematError(f"--lora {key} is unknown; there are {', '.join(names)} and targets, which comes last")
    settings: dict[str, Any] = {names[key]: value for key, value in given.items()}
    if targets:
        settings["target_modules"] = targets.split(",")
    with _told(f"--lora {text}"):
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return adapted


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer | None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "none" or not trained:
        return None
    if name in ("sgd", "momentum"):
        return torch.optim.SGD(trained, lr=1e-3, momentum=0.9 if name == "momentum" else 0.0)
    if name == "adafactor":
        return torch.optim.Adafactor(trained)
    return torch.optim.AdamW(trained) if name == "adamw" else torch.optim.Adam(trained)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside, which is other people's code, into one line that says what it was about."""
    try:
        yield
    except Exception as error:
        raise RematError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
