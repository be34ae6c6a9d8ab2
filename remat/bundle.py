"""All that a bug report needs in one file: plans, graphs and versions, no weights and no data."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from remat.assembly import Region
from remat.passes.provenance import module_path
from remat.planned import plans_of
from remat.views.dot import dot_of

_PACKAGES = ("remat", "torch", "numpy", "scipy", "sympy", "transformers", "peft", "accelerate", "diffusers", "altair")


def report(model: Any, path: str | Path = "remat-report.zip") -> Path:
    """Write one zip about a model from `remat.optimize`, under `remat.enable` or compiled with backend "remat"; returns
    its path.

    In it are the plans (JSON and text), the rewritten graphs (text and DOT), and versions; names of modules and shapes among
    them. Values of weights and inputs are not, nor paths of your files, nor lines of your code.

    Raises RematError for a model that has no plan yet, or was not made by remat.
    """
    found = plans_of(model)
    path = Path(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("versions.json", json.dumps(_versions(), indent=1))
        for index, (plan, graphs) in enumerate(found):
            file.writestr(f"plan_{index}.json", plan.to_json())
            file.writestr(f"plan_{index}.txt", plan.summary())
            file.writestr(f"graph_{index}.dot", dot_of(graphs))
            for name, module in _with_regions(graphs):
                file.writestr(f"graph_{index}_{name}.txt", "\n".join(_listing(module)))
    return path


def _with_regions(graphs: Mapping[str, fx.GraphModule]) -> Iterator[tuple[str, fx.GraphModule]]:
    for name, module in graphs.items():
        yield name, module
        regions = ((part, child) for part, child in module.named_children() if isinstance(child, Region))
        yield from ((f"{name}_{part}", child) for part, child in regions)


def _listing(module: fx.GraphModule) -> Iterator[str]:
    """A graph as text: names, ops and shapes."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        shape = f"{str(value.dtype)[6:]}{list(value.shape)} " if isinstance(value, torch.Tensor) else ""
        decision = f"  # {node.meta['recompute'].name}" if "recompute" in node.meta else ""
        yield f"{node.name} = {shape}{node.op} {node.target} {node.args} {node.kwargs} {module_path(node)}{decision}"


def _versions() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "system": platform.platform(), "packages": versions, "devices": devices}
