"""From captured forward graphs to a `Program`: one step on fake tensors under `remat.recorder`, written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from remat import _torch
from remat.absent import scratch_bytes
from remat.backward import loss_from, run_backward
from remat.captured import Captured
from remat.devices import DeviceProfile
from remat.op_times import OpTimes
from remat.passes.pinning import why_pinned
from remat.passes.provenance import module_path
from remat.passes.randomness import may_draw
from remat.program import HELD, RETURNED, Fixed, Op, Program, Value
from remat.recorded import Storage
from remat.recorder import Recorder
from remat.resident import bytes_beside
from remat.settings import Settings
from remat.site import Site
from remat.workspace import Call, workspace_bytes


def record(
    captured: Captured,
    tensors: Sequence[torch.Tensor],
    site: Site,
    settings: Settings,
) -> Program:
    """Record one training step of the captured graph; one that adds to gradients where there are any, or with several forwards
    in flight for all.

    tensors: one per placeholder; only their metadata is used. Of `settings` only what the step is counts.
    """
    recorder = Recorder(site.profile)
    fake = _torch.FakeTensorMode()
    with fake:
        inputs = [_torch.fake_like(tensor) for tensor in tensors]
    for tensor, real, source in zip(inputs, tensors, captured.sources, strict=True):
        recorder.know(tensor)
        trains = settings.in_flight > 1 and source.kind == "parameter" and real.requires_grad
        if trains or (real.is_leaf and real.grad is not None):
            with fake:
                tensor.grad = torch.empty_like(tensor)
            recorder.know(tensor.grad)
    with fake, recorder.forward():
        outputs = recorder.run_graph(captured, inputs)
    output, returned = captured.output_of(outputs), recorder.behind(outputs)
    with fake, recorder.backward():
        loss, held = loss_from(output, recorder, settings)
        holds_outputs = held is output
        del outputs, output
        of_results = dict.fromkeys(map(id, returned), RETURNED) | dict.fromkeys(map(id, recorder.behind(held)), HELD)
        run_backward(loss, recorder)
    mutated = mutated_inputs(captured)
    pins = {id(s): why_pinned(s.node, mutated) for s in recorder.all if s.node is not None}
    others = site.resident["others"] + bytes_beside(recorder.found, tensors)
    site = dataclasses.replace(site, resident={**site.resident, "others": others})
    return write_program(recorder, pins | of_results, site, holds_outputs)


def write_program(
    recorder: Recorder,
    pins: Mapping[int, str],
    site: Site,
    holds_outputs: bool,
    parts: tuple[tuple[int, int], ...] = (),
) -> Program:
    """The recorded step as numbers. `pins` are the storages that a plan decides about, by id, and why each can only be saved,
    "" where it need not; `holds_outputs` and `parts` as in `Program`."""
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
        holds_outputs=holds_outputs,
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
        if storage.in_function and pin not in (HELD, RETURNED) and dies >= n_forward and dies > storage.release:
            pin = _IN_FUNCTION
        if pin in (RETURNED, _IN_FUNCTION) and dies >= n_forward and dies > storage.release:
            storage.release = dies
            storage.reads.append(dies)
        last_forward = end if pin == HELD else max(storage.last_forward, born)
        if pin and (dies < n_forward or not storage.packed or pin == RETURNED):  # a variable may hold it after its last reader
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
