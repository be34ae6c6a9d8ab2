"""What of a model's ways is captured."""

from __future__ import annotations

import copy

import torch
from torch import nn

import remat
from remat.capture import capture
from tests import models


def _has_mask(model: nn.Module, **kwargs: torch.Tensor) -> bool:
    nodes = capture(model, (), kwargs).graph.nodes
    return any("attn_mask" in node.kwargs and node.kwargs["attn_mask"] is not None for node in nodes)


def test_no_causal_mask_where_positions_are_the_models_own() -> None:
    """As in an eager step, where transformers leaves it to the attention kernel."""
    model, kwargs = models.llama(layers=1)
    assert not _has_mask(model, **kwargs)


def test_positions_among_the_inputs_may_be_of_several_sequences() -> None:
    model, kwargs = models.llama(layers=1)
    positions = torch.arange(models.LENGTH // 2).repeat(models.BATCH, 2)
    assert _has_mask(model, **kwargs, position_ids=positions)
    plain = copy.deepcopy(model)
    ours = remat.optimize(model, budget=None)
    for inputs in ({**kwargs, "position_ids": positions}, {**kwargs, "position_ids": positions.sort().values}):
        torch.testing.assert_close(ours(**inputs).loss, plain(**inputs).loss)


class _FromInputs(nn.Module):
    """Positions follow from the inputs: a row begins anew after each 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, _ = models.llama(layers=1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        begins = torch.where(input_ids == 0, steps, 0).cummax(1).values
        return self.inner(input_ids=input_ids, position_ids=steps - begins).logits


def test_positions_that_follow_from_inputs_are_looked_at() -> None:
    torch.manual_seed(0)
    model = _FromInputs().train()
    plain, ids = copy.deepcopy(model), torch.randint(1, models.VOCABULARY, (models.BATCH, models.LENGTH))
    packed = ids.clone()
    packed[:, 20] = 0
    ours = remat.optimize(model, (ids,), budget=None)
    torch.testing.assert_close(ours(packed), plain(packed))
