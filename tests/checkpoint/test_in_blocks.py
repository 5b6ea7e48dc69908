"""Checkpoints that are run block by block against the same folder as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_fairness_plugin.checkpoint.in_blocks import BlockLogits, stream_checkpoint
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.streamed import budget_of, open_streamed
from quant_fairness_plugin.serve.load import load_quantized
from quant_fairness_plugin.steps import exported_state
from tests.export.build import TEXTS, quantize_tiny, quantize_with_columns

ROWS = [(0, 5, 9, 200, 3), (7,), (11, 12, 13)]


@pytest.mark.parametrize(
    ("family", "format_name"),
    [
        ("llama", "compressed-tensors"),
        ("gpt_neox", "gptq"),
        ("gpt2", "fp16-twin"),
        ("bloom", "compressed-tensors"),
        ("qwen3_moe", "compressed-tensors"),
        ("mixtral", "compressed-tensors"),
        ("mixtral", "fp16-twin"),
    ],
)
def test_logits_are_those_of_the_whole_model(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, format_name: Any
) -> None:
    folder = tmp_path / "out"
    export(quantize_tiny(tiny_model(family, layers=2)), folder, texts=TEXTS, format=format_name)
    model = load_quantized(folder, kernel="reference")
    for row, found in zip(ROWS, BlockLogits(folder, ROWS), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits
        # The same float32 products, the head's in pieces.
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_channels_in_16_bit_are_added_and_one_block_is_in_memory(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export(quantize_with_columns(tiny_model("llama", layers=2)), folder, texts=TEXTS)
    whole = load_quantized(folder, kernel="reference")
    streamed = stream_checkpoint(folder)
    assert streamed.columns
    for layer in range(streamed.layers):
        with streamed.resident(layer):
            for name, value in streamed.block(layer).named_parameters():
                expected = whole.get_parameter(f"{streamed.family.blocks}.{layer}.{name}")
                assert torch.equal(value, expected), name
    assert all(parameter.is_meta for parameter in streamed.block(1).parameters())


def test_a_checkpoint_beside_its_original_keeps_the_memory_budget(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, folder = tiny_model("llama", layers=2), tmp_path / "out"
    export(quantize_tiny(source), folder, texts=TEXTS)
    original = replace(open_streamed(str(source)), memory_budget=1 << 20)
    state = exported_state(folder, original)
    assert state.blocks is not None
    assert budget_of(state.blocks) == 1 << 20
