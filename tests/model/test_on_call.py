"""A model whose blocks are in files, called as a whole, against the same model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_fairness_plugin.model import on_call
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.on_call import read_on_call
from quant_fairness_plugin.model.streamed import open_streamed
from tests.tiny import FAMILIES, MIXTURES

Build = Callable[..., Path]
IDS = torch.tensor([[7, 3, 11, 2, 5], [0, 0, 13, 4, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def call(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_a_call_gives_the_logits_of_the_model_in_memory(
    family: str, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_call, "VOCABULARY_PIECE", 37)  # several pieces, the last one shorter
    folder = tiny_model(family)
    streamed, expected = open_streamed(str(folder)), call(load_model(str(folder)).model)
    with read_on_call(streamed):
        found = call(streamed.model)
        assert all(parameter.is_meta for parameter in streamed.block(1).parameters())
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)  # another order of float32 sums
    assert all(parameter.is_meta for parameter in streamed.block(1).parameters())


@torch.no_grad()
def test_generation_is_that_of_the_model_in_memory_and_an_error_leaves_nothing_behind(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    streamed, whole = open_streamed(str(folder)), load_model(str(folder)).model
    settings: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def fail(*_: Any) -> None:
        raise RuntimeError("in the second block")

    with read_on_call(streamed):
        handle = streamed.block(1).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the second block"):
            call(streamed.model)
        handle.remove()
        assert all(parameter.is_meta for parameter in streamed.block(1).parameters())
        found = streamed.model.generate(input_ids=IDS, **settings)  # type: ignore[operator]
    assert torch.equal(found, whole.generate(input_ids=IDS, **settings))  # type: ignore[operator]
    assert "forward" not in vars(streamed.model.get_submodule(streamed.family.head))
