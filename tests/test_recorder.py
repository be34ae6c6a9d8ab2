"""What the recorder counts."""

from __future__ import annotations

import torch

from remat import _torch
from remat._torch import fake_like
from remat.devices import profile_of
from remat.recorder import Recorder


def test_memory_made_after_constants_have_gone_counts() -> None:
    recorder = Recorder(profile_of(torch.device("cpu")))
    with _torch.FakeTensorMode():
        constants = [fake_like(torch.empty(16)) for _ in range(100)]
        for constant in constants:
            recorder.know(constant)
        del constant, constants  # what is made next is likely to lie in their place
        with recorder.forward():
            made = [torch.empty(16) for _ in range(100)]
    assert len(recorder.all) == len(made)
