"""Sizes as text, and what a sweep needs from shapes alone, against a model counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quant_fairness_plugin.errors import ConfigError, ResourceError
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.model.sizes import parse_size, shown
from quant_fairness_plugin.model.stacks import batches_in_memory
from quant_fairness_plugin.sweep.memory import check_budget, count_needs


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("123456", 123456), ("7B", 7), ("2KB", 2000), ("2KiB", 2048), ("1.5MB", 1_500_000),
        ("1 GiB", 1 << 30), (" 0.5gib ", 1 << 29), ("1TB", 10**12), ("1gb", 10**9),
    ],
)  # fmt: skip
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 XB", "1e9", "0", "0.0001KB", "1GB extra", "٣GB", "inf", "1,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"size .* is none; write a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("size", [1, 999, 1001, 12_345_678, 1_230_000_001])
def test_a_size_that_is_shown_is_enough(size: int) -> None:
    assert parse_size(shown(size).replace(" bytes", "")) >= size
    assert parse_size(shown(size).replace(" bytes", "")) <= 1.01 * size


def test_one_block_in_every_precision_is_counted(tiny_model: Callable[..., Path]) -> None:
    outline = outline_model(resolve_model(str(tiny_model("llama", layers=3))))
    block = 2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    needs = count_needs(outline.shapes, blocks=outline.family.blocks, precisions=2)
    assert needs.blocks == block * (3 * 4 + 2)
    # The head's 4096 tokens are most here: activations of 1024 tokens are 4 * 1024 * (4 * 32 + 3 * 64).
    assert needs.work == 3 * 4 * 4096 * 32 > 4 * 1024 * 320
    assert needs.left_for_states(needs.least + 7) == 7
    wide = count_needs(outline.shapes, blocks=outline.family.blocks, precisions=2, tokens=8192)
    assert wide.work == 4 * 8192 * 320
    tables = count_needs(outline.shapes, blocks=outline.family.blocks, precisions=2, widened=10**6)
    assert tables.work == 20 * 10**6


def test_a_budget_below_one_block_is_refused_with_the_number_that_is_needed(tiny_model: Callable[..., Path]) -> None:
    outline = outline_model(resolve_model(str(tiny_model("gpt2", layers=3))))
    needs = count_needs(outline.shapes, blocks=outline.family.blocks, precisions=1)
    check_budget(outline, needs.least, precisions=1)
    with pytest.raises(
        ResourceError, match=rf"memory budget .* need {shown(needs.least)}; raise the budget to that or more"
    ):
        check_budget(outline, needs.least - 1, precisions=1)


@pytest.mark.parametrize(
    ("allowance", "held"), [(0, set()), (99, set()), (150, {1}), (160, {1, 2}), (200, {0}), (260, {0, 1, 2})]
)
def test_batches_are_held_as_far_as_memory_goes(allowance: int, held: set[int]) -> None:
    """One of them twice: before and after the layer."""
    assert batches_in_memory([100, 50, 10], allowance) == held
