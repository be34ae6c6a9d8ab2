"""From captured forward graphs to a `Program`: one step on fake tensors under `remat.recorder`, written down."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from remat import _torch
from remat.absent import scratch_bytes
from remat.captured import Captured
from remat.devices import DeviceProfile
from remat.errors import CaptureError, RematError
from remat.export import DOOR_2
from remat.op_times import OpTimes
from remat.passes.pinning import why_pinned
from remat.passes.provenance import module_path
from remat.passes.randomness import may_draw
from remat.program import HELD, Fixed, Op, Program, Value
from remat.recorded import Storage
from remat.recorder import Recorder
from remat.resident import bytes_beside
from remat.site import Site
from remat.workspace import Call, workspace_bytes


def record(
    captured: Captured,
    tensors: Sequence[torch.Tensor],
    site: Site,
    adds: bool = False,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Program:
    """Record one training step of the captured graph; one that adds to gradients where there are any, or for all if `adds`.

    tensors: one per placeholder; only their metadata is used. Outputs of the model are counted as held until the step ends.
    Backward begins as `backward_from` says.
    """
    recorder = Recorder(site.profile)
    fake = _torch.FakeTensorMode()
    with fake:
        inputs = [_torch.fake_like(tensor) for tensor in tensors]
    for tensor, real, source in zip(inputs, tensors, captured.sources, strict=True):
        recorder.know(tensor)
        trains = adds and source.kind == "parameter" and real.requires_grad
        if trains or (real.is_leaf and real.grad is not None):
            with fake:
                tensor.grad = torch.empty_like(tensor)
            recorder.know(tensor.grad)
    with fake, recorder.forward():
        outputs = recorder.run_graph(captured, inputs)
    with fake, recorder.backward():
        backward_from(captured.output_of(outputs), recorder, loss)
    produced = {ran.node: ran.storages for ran in recorder.ran}
    escaping = {id(s) for node in captured.graph.output_node().all_input_nodes for s in produced.get(node, ())}
    pins = {id(s): why_pinned(s.node, mutated_inputs(captured)) for s in recorder.all if s.node is not None}
    others = site.resident["others"] + bytes_beside(recorder.found, tensors)
    site = dataclasses.replace(site, resident={**site.resident, "others": others})
    return write_program(recorder, pins | dict.fromkeys(escaping, HELD), site)


def backward_from(output: Any, recorder: Recorder, loss_of: Callable[[Any], torch.Tensor] | None = None) -> None:
    """Backward from what `loss_of` makes of a model's output. Without it, from what is named `loss` there, or a scalar that all
    else has led to; or else from some loss outside of the model, which gives every tensor that requires grad a dense gradient.
    """
    loss = _found_loss(output) if loss_of is None else _computed_loss(output, recorder, loss_of)
    recorder.watch_sums(loss)
    try:
        with _torch.without_autocast(), _fake_gradients(loss, recorder):
            loss.backward()
    except RematError:
        raise
    except Exception as error:  # an op without a derivative; of any kind where a function of the model's own runs
        raise CaptureError(f"there is no backward to plan for: {error}; {DOOR_2}") from error


@contextlib.contextmanager
def _fake_gradients(loss: Any, recorder: Recorder) -> Iterator[None]:
    """Parameters with values, which a loss outside of the model trains, have fake gradients meanwhile."""
    leaves = (node.variable for node in _torch.autograd_nodes(loss) if _torch.is_leaf_node(node))
    real = [leaf for leaf in leaves if not _torch.is_fake(leaf)]
    before = [leaf.grad for leaf in real]
    try:
        for leaf in real:
            if leaf.grad is not None:
                recorder.found.append(leaf.grad)
                with _torch.no_dispatch_modes(), loss.fake_mode:  # no memory of the step
                    leaf.grad = _torch.fake_like(leaf.grad)
                recorder.know(leaf.grad)
        yield
    finally:
        for leaf, gradient in zip(real, before, strict=True):
            leaf.grad = gradient


def _computed_loss(output: Any, recorder: Recorder, loss_of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """`loss_of` runs between forward and backward, as part of which it counts: no plan decides about it."""
    try:
        loss = recorder.run_loss(lambda: loss_of(output))
    except (_torch.DataDependentOutputException, _torch.DynamicOutputShapeException) as error:
        raise RematError(
            f"{_LOSS_FAILS}: {error.func} reads them (what a mask picks has no size there: weigh by it, or use ignore_index)"
        ) from error
    except Exception as error:  # of any kind: it is the user's
        raise RematError(f"{_LOSS_FAILS}: {error}") from error
    if not _torch.is_fake(loss) or loss.numel() != 1 or not loss.requires_grad:
        raise RematError("loss= has to make of the output a tensor of one number that requires grad")
    if any(_torch.is_numbered_before(node, recorder.first) for node in _torch.autograd_nodes(loss)):
        raise RematError("loss= reads a result whose graph was made before, which planning would run backward; detach it there")
    recorder.found[:] = [tensor for tensor in recorder.found if tensor.device == loss.device]
    return loss


_LOSS_FAILS = "loss= fails on the model's output, which has no values while planning"


def _found_loss(output: Any) -> torch.Tensor:
    leaves = [o for o in _torch.pytree.tree_leaves(output) if isinstance(o, torch.Tensor)]
    differentiable = [o for o in leaves if o.requires_grad]
    if not differentiable:
        found = "no tensor is found" if not leaves else "nothing requires grad"
        raise CaptureError(
            f"{found} in the {type(output).__name__} that the model returns, so that there is no backward to plan for"
        )
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    losses = [o for o in differentiable if o.dim() == 0 and (o is named or _is_after(o, differentiable))]
    return losses[0] if losses else _Loss.apply(*differentiable)


def _is_after(loss: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether backward from `loss` passes through all `others`."""
    nodes = _torch.autograd_nodes(loss)
    return all(other is loss or other.grad_fn in nodes for other in others)


class _Loss(torch.autograd.Function):
    """Some loss outside of the model: it gives each output a dense gradient, which the engine lets go of after use."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(o.shape, o.dtype, o.device) for o in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def write_program(
    recorder: Recorder,
    pins: Mapping[int, str],
    site: Site,
    parts: tuple[tuple[int, int], ...] = (),
) -> Program:
    """The recorded step as numbers. `pins` are the storages that a plan decides about, by id, and why each can only be saved,
    "" where it need not; `parts` as in `Program`."""
    device, times, resident, end = site.profile, site.times, site.resident, recorder.position - 1
    values, index, fixed = _lifetimes(recorder, pins)
    largest = max((storage.bytes for storage in recorder.all), default=0)
    fixed.append(Fixed(0, end, device.slack_bytes(largest)))
    scratch = workspace_bytes if device.is_here else scratch_bytes
    forward = []
    for position, ran in enumerate(recorder.ran):
        own = tuple(index[id(s)] for s in ran.storages if id(s) in index and s.born == position)
        workspace = max([scratch(ran.call), *(scratch(call) + beside for call, beside in ran.inside)])
        op = Op(ran.node.name, _time_us(times, ran.call, ran.cost_us), workspace)
        if own:
            reads = tuple(dict.fromkeys(index[id(s)] for s in ran.reads if id(s) in index))
            state = _rng_state_bytes(device) if may_draw(ran.node) else 0
            op = op._replace(inputs=reads, outputs=own, launch_us=device.recompute_launch_us, state_bytes=state)
        forward.append(op)
    kernels = recorder.kernels
    backward = tuple(Op(k.name, _time_us(times, k.call, k.cost_us), scratch(k.call), origin=k.origin) for k in kernels)
    if times is not None:
        times.save()
    ready = recorder.gradient_ready.items()
    return Program(
        tuple(forward),
        backward,
        tuple(values),
        tuple(fixed),
        sum(resident.values()),
        tuple(sorted((at, recorder.ran[position].node.name) for position, at in ready)),
        None if parts else device.link,
        resident=tuple(resident.items()),
        modules=tuple(module_path(ran.node) for ran in recorder.ran),
        parts=parts,
        loss_ops=recorder.loss_ops,
    )


def _lifetimes(recorder: Recorder, pins: Mapping[int, str]) -> tuple[list[Value], dict[int, int], list[Fixed]]:
    """What the ops of forward make, the index of each by the id of its storage, and everything else that was allocated."""
    end, n_forward = recorder.position - 1, len(recorder.ran)
    values: list[Value] = []
    index: dict[int, int] = {}
    fixed: list[Fixed] = []
    for storage in recorder.all:
        born = storage.born
        dies = end if storage.dies < 0 else storage.dies
        if storage.node is None or id(storage) not in pins:
            fixed.append(Fixed(born, max(dies, born), storage.bytes, storage.kind or _kind(storage, n_forward)))
            continue
        pin = HELD if storage.released < storage.packed else pins[id(storage)]  # by the graph of one that has no gradient
        if not pin and storage.packed and dies < n_forward:
            pin = _LET_GO
        if storage.in_function and pin != HELD and dies >= n_forward and dies > storage.release:
            pin, storage.release = _IN_FUNCTION, dies
            storage.reads.append(dies)
        last_forward = end if pin == HELD else max(storage.last_forward, born)
        if pin and (dies < n_forward or not storage.packed):  # a variable may hold it after its last reader
            last_forward = max(last_forward, min(dies, n_forward - 1))
        reads = tuple(sorted(set(storage.reads)))
        index[id(storage)] = len(values)
        values.append(Value(storage.node.name, storage.bytes, born, last_forward, reads, storage.release, pin))
    return values, index, fixed


_IN_FUNCTION = "an autograd function holds it beside what it saves for backward"
_LET_GO = "what autograd keeps of it goes in forward"


def _kind(storage: Storage, n_forward: int) -> str:
    """What a storage is for that is not an op's result in forward."""
    if storage.born >= n_forward:
        return "working set" if storage.dies >= 0 else "gradients"
    return "activations" if storage.packed else "working set"


def _time_us(times: OpTimes | None, call: Call | None, estimate_us: float) -> float:
    return estimate_us if times is None or call is None else times.time_us(call, estimate_us)


def _rng_state_bytes(device: DeviceProfile) -> int:
    """What the runtime keeps to replay a random op: the Mersenne twister's state; a GPU's lies in host memory."""
    return 0 if device.is_gpu else torch.get_rng_state().nbytes


def mutated_inputs(captured: Captured) -> frozenset[fx.Node]:
    """The placeholders of what the step writes to."""
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    targets = {source for _, source in captured.mutations}
    return frozenset(n for n, source in zip(placeholders, captured.sources, strict=True) if source in targets)
