from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.rehearsal import head_input, rehearse
from tests.tiny import FAMILIES, VOCABULARY

Build = Callable[..., Path]


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tiny_model: Build) -> LoadedModel:
    return load_model(str(tiny_model(request.param, layers=3)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 7 tokens, the first padded."""
    ids = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return ids, mask


def test_blocks_run_from_outside_give_the_models_own_logits(loaded: LoadedModel) -> None:
    ids, mask = batch()
    rehearsal = rehearse(loaded, ids, mask)
    hidden = rehearsal.hidden
    for layer, call in enumerate(rehearsal.calls):
        hidden = call.run(loaded.block(layer), hidden)
    given = head_input(loaded, ids, mask, hidden)
    with torch.no_grad():
        ours = loaded.model.get_submodule(loaded.family.head)(given)
        expected = loaded.model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours[mask.bool()], expected[mask.bool()])


def test_the_head_input_does_not_depend_on_the_ids(loaded: LoadedModel) -> None:
    ids, mask = batch()
    hidden = torch.randn(3, 7, rehearse(loaded, ids, mask).hidden.shape[-1])
    assert torch.equal(head_input(loaded, ids, mask, hidden), head_input(loaded, ids.flip(0), mask, hidden))


def test_no_hook_or_replaced_block_is_left_behind(loaded: LoadedModel) -> None:
    ids, mask = batch()
    before = loaded.model(input_ids=ids).logits
    rehearse(loaded, ids, mask)
    with pytest.raises(IndexError, match="out of range"):
        rehearse(loaded, torch.full_like(ids, 99_999), mask)
    assert not any("forward" in vars(loaded.block(i)) for i in range(loaded.layers))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    assert torch.equal(loaded.model(input_ids=ids).logits, before)
