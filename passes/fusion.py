"""What Inductor computes inside other kernels and never stores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from remat._torch import OpOverload
from remat.passes.aliasing import is_view, owner
from remat.passes.randomness import is_random

_READS, _READS_AT_MOST = 4, 8  # Inductor's realize_reads_threshold and realize_acc_reads_threshold
_POINTWISE_ANYWAY = frozenset(
    [
        "where",
        "_to_copy",
        "clone",
        "full",
        "full_like",
        "iota",
        "scalar_tensor",
        "cat",
        "constant_pad_nd",
        "convert_element_type",
        "inductor_random",
        "inductor_lookup_seed",
        "gather",
        "index",
        "embedding",
        "slice_scatter",
    ]
)
_COSTLY = frozenset(["exp", "log", "log10", "log1p", "log2", "sigmoid", "tanh"])
_REDUCTIONS = frozenset(["sum", "mean", "amax", "amin", "var", "var_mean", "any", "all", "prod", "argmax", "argmin"])


def find_inlined(nodes: Sequence[fx.Node], outputs: set[fx.Node]) -> frozenset[fx.Node]:
    """Pointwise nodes all of whose readers are pointwise or reductions: Inductor stores none of them, unless they read much for
    more than one kernel, which ends chains such as a residual stream (`StorageBox.mark_reuse` and `has_exceeded_max_reads`).
    Draws are stored.
    """
    reads: dict[fx.Node, frozenset[fx.Node]] = {}  # stored tensors that an inlined node reads
    found: set[fx.Node] = set()
    for node in nodes:
        sources = {owner(source) for source in node.all_input_nodes}
        below = frozenset[fx.Node]().union(*(reads[s] if s in found else (s,) for s in sources))
        reads[node] = below
        if is_view(node) or node in outputs or not is_pointwise(node) or is_random(node) or op_name(node) == "inductor_random":
            continue
        if not all(_fuses_into(user, outputs) for user in node.users):
            continue
        if len(below) <= (_READS if len(node.users) > 1 else _READS_AT_MOST):
            found.add(node)
        elif _is_within_a_loop(node):
            found.add(node)
            reads[node] = frozenset((node,))
    return frozenset(found)


def stored_on_reuse(inlined: Iterable[fx.Node]) -> set[fx.Node]:
    """Of inlined nodes, in running order, those that Inductor stores on CPUs if kernels that are apart read them: costly ones,
    and what is computed from these (`StorageBox.should_realize_on_reuse`). Their views belong to them."""
    found: set[fx.Node] = set()
    for node in inlined:
        is_stored = is_costly(node) and node.meta["val"].device.type == "cpu"
        if is_stored or not found.isdisjoint(map(owner, node.all_input_nodes)):
            found.add(node)
    return found


def is_costly(node: fx.Node) -> bool:
    """True for the pointwise ops that Inductor would rather store than compute for each reader on a CPU."""
    return op_name(node) in _COSTLY


def _is_within_a_loop(node: fx.Node) -> bool:
    """True if one kernel holds all readers: reductions, and what needs them, as in the gradient of a softmax."""
    reductions = {user for user in node.users if is_reduction(user)}
    return bool(reductions) and all(user in reductions or reductions.intersection(user.all_input_nodes) for user in node.users)


def _fuses_into(user: fx.Node, outputs: set[fx.Node]) -> bool:
    if user.op != "call_function":
        return False
    if is_view(user):
        return user not in outputs and all(_fuses_into(reader, outputs) for reader in user.users)
    return is_pointwise(user) or is_reduction(user)


def is_pointwise(node: fx.Node) -> bool:
    """True if Inductor computes each element of the result on its own."""
    if not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or op_name(node) in _POINTWISE_ANYWAY


def is_reduction(node: fx.Node) -> bool:
    """True if Inductor computes the result as a reduction."""
    return isinstance(node.target, OpOverload) and op_name(node) in _REDUCTIONS


def op_name(node: fx.Node) -> str:
    """The name of the op without its overload."""
    return getattr(node.target, "__name__", "").split(".")[0]


def is_mask(node: fx.Node) -> bool:
    """True for a comparison of what was drawn: a kernel that stores it takes as long as one that draws again, since Inductor's
    code for CPUs goes element by element there. It is made again from the draw, which may be saved."""
    value = node.meta.get("val")
    is_bool = isinstance(value, torch.Tensor) and value.dtype is torch.bool
    return is_bool and any(_is_draw(source) for source in node.all_input_nodes)


def _is_draw(node: fx.Node) -> bool:
    """True for random numbers, and for those cast to another dtype, as in dropout of half-precision values."""
    while op_name(node) in ("convert_element_type", "_to_copy"):
        node = node.all_input_nodes[0]
    return op_name(node) == "inductor_random"
