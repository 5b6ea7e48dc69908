"""Every packed layout reads back as the numbers that loops over single integers packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.checkpoint.dense_modules import Layout, dense_weight, tensor_layout
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError

Numbers = tuple[Tensor, Tensor, Tensor, Tensor]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def random_module(rows: int, cols: int, groups: int, bits: int, *, permuted: bool = False) -> Numbers:
    """Integers `[rows, cols]`, zero points and scales `[rows, groups]`, and the group of every column."""
    draw = torch.Generator().manual_seed(rows + cols + bits)
    integers = torch.randint(0, 2**bits, (rows, cols), generator=draw)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=draw)
    scales = torch.rand((rows, groups), generator=draw).half() + 0.01
    group = torch.arange(cols) // (cols // groups)
    return integers, zeros, scales, group[torch.randperm(cols, generator=draw)] if permuted else group


def naive(numbers: Numbers) -> Tensor:
    integers, zeros, scales, group = numbers
    weight = torch.empty(integers.shape)
    for n in range(integers.shape[0]):
        for k in range(integers.shape[1]):
            g = int(group[k])
            weight[n, k] = (int(integers[n, k]) - int(zeros[n, g])) * float(scales[n, g])
    return weight


def word(values: list[int], bits: int) -> int:
    total = sum(value << (bits * i) for i, value in enumerate(values))
    return total - 2**32 if total >= 2**31 else total


def packed(rows: Tensor, bits: int) -> Tensor:
    """Along the last dimension, an incomplete last word filled with zeros."""
    count = 32 // bits
    lists = [row + [0] * (-len(row) % count) for row in rows.tolist()]
    words = [[word(row[i : i + count], bits) for i in range(0, len(row), count)] for row in lists]
    return torch.tensor(words, dtype=torch.int32)


def as_gptq(numbers: Numbers, bits: int, *, minus: int) -> dict[str, Tensor]:
    integers, zeros, scales, group = numbers
    return {
        "qweight": packed(integers, bits).t(),
        "qzeros": packed((zeros.t() - minus) % 2**bits, bits),
        "scales": scales.t(),
        "g_idx": group.int(),
    }


def as_awq(numbers: Numbers) -> dict[str, Tensor]:
    def pack(rows: Tensor) -> Tensor:
        shuffled = [[row[8 * (i // 8) + AWQ_COLUMNS[i % 8]] for i in range(len(row))] for row in rows.tolist()]
        return packed(torch.tensor(shuffled), 4)

    integers, zeros, scales, _ = numbers
    return {"qweight": pack(integers.t()), "qzeros": pack(zeros.t()), "scales": scales.t()}


def as_compressed_tensors(numbers: Numbers, bits: int) -> dict[str, Tensor]:
    integers, zeros, scales, group = numbers
    return {
        "weight_packed": packed(integers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(integers.shape),
        "weight_zero_point": packed(zeros.t(), bits).t(),
        "weight_g_idx": group.int(),
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize(("layout", "minus"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_of_both_versions_and_widths(layout: Layout, minus: int, permuted: bool, bits: int) -> None:
    numbers = random_module(24, 48, 3, bits, permuted=permuted)
    assert torch.equal(dense_weight("m", as_gptq(numbers, bits, minus=minus), layout), naive(numbers))


def test_gptq_without_group_indices_has_its_groups_in_order() -> None:
    numbers = random_module(8, 32, 2, 4)
    parts = as_gptq(numbers, 4, minus=1)
    del parts["g_idx"]
    assert torch.equal(dense_weight("m", parts, "gptq"), naive(numbers))


def test_the_two_gptq_versions_are_not_taken_for_each_other() -> None:
    numbers = random_module(8, 32, 2, 4)
    assert not torch.equal(dense_weight("m", as_gptq(numbers, 4, minus=1), "gptq_v2"), naive(numbers))


@pytest.mark.parametrize(("rows", "cols", "groups"), [(8, 1, 1), (24, 63, 3), (40, 32, 1)])
def test_awq_in_the_order_of_its_own(rows: int, cols: int, groups: int) -> None:
    numbers = random_module(rows, cols, groups, 4)
    assert torch.equal(dense_weight("m", as_awq(numbers), "awq"), naive(numbers))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "groups"), [(17, 63, 3), (8, 32, 1), (5, 129, 3)])
def test_compressed_tensors_of_both_widths_and_odd_sizes(rows: int, cols: int, groups: int, bits: int) -> None:
    numbers = random_module(rows, cols, groups, bits)
    parts = as_compressed_tensors(numbers, bits)
    assert torch.equal(dense_weight("m", parts, "compressed-tensors"), naive(numbers))
    del parts["weight_g_idx"]
    assert torch.equal(dense_weight("m", parts, "compressed-tensors"), naive(numbers))
    del parts["weight_zero_point"]
    symmetric = (numbers[0], torch.full_like(numbers[1], 2 ** (bits - 1)), *numbers[2:])
    assert torch.equal(dense_weight("m", parts, "compressed-tensors"), naive(symmetric))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "'scales' is missing"),
        ({"qweight": torch.zeros((6, 24), dtype=torch.int64)}, "expected torch.int32"),
        ({"qzeros": torch.zeros((3, 5), dtype=torch.int32)}, "neither of 4 bits nor of 8"),
        ({"g_idx": torch.zeros(47, dtype=torch.int32)}, "g_idx of shape"),
        ({"g_idx": torch.full((48,), 3, dtype=torch.int32)}, "out of range|out of bounds"),
        ({"g_idx": torch.full((48,), -1, dtype=torch.int32)}, "g_idx of shape"),
    ],
)
def test_tensors_that_do_not_fit_are_an_artifact_error(change: dict[str, Tensor | None], message: str) -> None:
    parts: dict[str, Any] = as_gptq(random_module(24, 48, 3, 4), 4, minus=1) | change
    with pytest.raises(ArtifactError, match=f"m: its tensors do not fit together.*({message})"):
        dense_weight("m", {name: value for name, value in parts.items() if value is not None}, "gptq")


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq", "format": "gptq", "is_marlin_format": False}, "gptq"),
        ({"quant_method": "awq", "version": "GEMM"}, "awq"),
        ({"quant_method": "awq", "checkpoint_format": "gemm"}, "awq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_the_metadata_of_every_tool_names_a_layout(metadata: dict[str, Any], layout: str) -> None:
    assert tensor_layout(metadata) == layout


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"quant_method": "awq", "version": "GEMV"}, "awq version 'GEMV'"),
        ({"quant_method": "awq", "version": "marlin"}, "awq version 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas'"),
        ({"quant_method": "hqq"}, "quant_method 'hqq' cannot be dequantized here"),
        ({}, "quant_method None"),
    ],
)
def test_other_layouts_are_refused_by_name(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tensor_layout(metadata)
