"""Bit layouts: round trips are exact, and every word is the one that a loop over Python integers builds."""

from __future__ import annotations

import pytest
import torch
from quant_fairness_kernels.packing import (
    GptqTensors,
    pack_compressed_tensors,
    pack_gptq,
    pack_int4,
    unpack_compressed_tensors,
    unpack_gptq,
    unpack_int4,
)
from torch import Tensor

SIZES = (1, 7, 8, 9, 17, 33, 63, 64)


def random_module(rows: int, cols: int, groups: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    integers = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, groups, generator=generator).to(torch.float16)
    random_zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    return integers, scales, torch.full_like(random_zeros, 8) if symmetric else random_zeros


def naive_word(values: list[int]) -> int:
    """Eight integers as the signed 32-bit integer that holds them, the first in the lowest bits."""
    digits = "".join(f"{value:x}" for value in reversed(values + [0] * (8 - len(values))))
    return int.from_bytes(bytes.fromhex(digits), "big", signed=True)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("cols", SIZES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_round_trip_is_exact_at_every_size(rows: int, cols: int, dim: int) -> None:
    values, _, _ = random_module(rows, cols, 1, symmetric=True)
    back = unpack_int4(pack_int4(values, dim=dim), dim=dim, length=values.shape[dim])
    assert back.dtype == torch.uint8
    assert torch.equal(back, values)


@pytest.mark.parametrize("cols", SIZES)
def test_words_equal_a_loop_over_python_integers(cols: int) -> None:
    values, _, _ = random_module(5, cols, 1, symmetric=True)
    expected = [[naive_word(row[start : start + 8]) for start in range(0, cols, 8)] for row in values.tolist()]
    assert pack_int4(values, dim=1).tolist() == expected


def test_the_highest_nibble_makes_the_word_negative_and_still_comes_back() -> None:
    values = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert pack_int4(values, dim=1).item() == -(2**28)
    assert torch.equal(unpack_int4(pack_int4(values, dim=1), dim=1, length=8), values)


def test_a_transposed_view_packs_like_its_copy() -> None:
    values, _, _ = random_module(16, 24, 1, symmetric=True)
    assert torch.equal(pack_int4(values.t(), dim=0), pack_int4(values.t().contiguous(), dim=0))


@pytest.mark.parametrize(("symmetric", "groups"), [(True, 1), (True, 3), (False, 3), (False, 6)])
def test_gptq_round_trip_is_exact(symmetric: bool, groups: int) -> None:
    module = random_module(16, 96, groups, symmetric=symmetric)
    for got, expected in zip(unpack_gptq(pack_gptq(*module)), module, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_gptq_stores_the_values_that_the_field_reads() -> None:
    integers, scales, zeros = random_module(16, 96, 3, symmetric=True)
    tensors = pack_gptq(integers, scales, zeros)
    assert tensors.qweight.shape == (12, 16)
    assert tensors.qweight[2, 5].item() == naive_word(integers[5, 16:24].tolist())
    assert tensors.qzeros.shape == (3, 2)
    assert set(tensors.qzeros.flatten().tolist()) == {0x77777777}
    assert tensors.scales.shape == (3, 16)
    assert tensors.scales[1, 4] == scales[4, 1]
    assert tensors.g_idx.tolist() == [0] * 32 + [1] * 32 + [2] * 32


def test_gptq_zero_point_zero_wraps_to_fifteen() -> None:
    integers, scales, _ = random_module(8, 8, 1, symmetric=True)
    zeros = torch.zeros(8, 1, dtype=torch.uint8)
    tensors = pack_gptq(integers, scales, zeros)
    assert tensors.qzeros.tolist() == [[-1]]
    assert torch.equal(unpack_gptq(tensors)[2], zeros)


@pytest.mark.parametrize("shape", [(12, 16), (16, 12)])
def test_gptq_refuses_sizes_that_do_not_fill_words(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\[1[26], 1[26]\] must be multiples of 8"):
        pack_gptq(*random_module(*shape, 1, symmetric=True))


def test_gptq_refuses_permuted_groups() -> None:
    tensors = pack_gptq(*random_module(16, 96, 3, symmetric=True))
    with pytest.raises(ValueError, match="act-order"):
        unpack_gptq(GptqTensors(tensors.qweight, tensors.qzeros, tensors.scales, tensors.g_idx.flip(0)))


@pytest.mark.parametrize(("rows", "cols", "groups"), [(1, 32, 1), (17, 33, 3), (63, 64, 2), (33, 17, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_round_trip_is_exact(rows: int, cols: int, groups: int, symmetric: bool) -> None:
    module = random_module(rows, cols, groups, symmetric=symmetric)
    tensors = pack_compressed_tensors(*module, symmetric=symmetric)
    assert tensors.weight_shape.tolist() == [rows, cols]
    for got, expected in zip(unpack_compressed_tensors(tensors), module, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("rows", "cols", "groups"), [(17, 64, 2), (33, 36, 3), (8, 32, 1)])
def test_compressed_tensors_words_equal_those_of_the_reference_package(rows: int, cols: int, groups: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers, scales, zeros = random_module(rows, cols, groups, symmetric=False)
    tensors = pack_compressed_tensors(integers, scales, zeros, symmetric=False)
    signed, signed_zeros = ((x.to(torch.int16) - 8).to(torch.int8) for x in (integers, zeros))
    assert torch.equal(tensors.weight_packed, pack_to_int32(signed, 4))
    assert tensors.weight_zero_point is not None
    assert torch.equal(tensors.weight_zero_point, pack_to_int32(signed_zeros, 4, packed_dim=0))


def test_symmetric_layout_refuses_another_zero_point() -> None:
    integers, scales, zeros = random_module(8, 32, 1, symmetric=True)
    zeros[3, 0] = 7
    with pytest.raises(ValueError, match="zero point 8 everywhere"):
        pack_compressed_tensors(integers, scales, zeros, symmetric=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([16]), r"values 16\.\.16"),
        (torch.tensor([3, -1]), r"values -1\.\.3"),
        (torch.tensor([1.0]), "cannot pack torch.float32"),
    ],
)
def test_values_that_need_more_than_four_bits_are_refused(values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_int4(values, dim=0)


@pytest.mark.parametrize("length", [8, 17])
def test_unpacking_refuses_a_length_that_does_not_fit_the_words(length: int) -> None:
    words = pack_int4(torch.zeros(16, dtype=torch.uint8), dim=0)
    with pytest.raises(ValueError, match=f"{length} integers need"):
        unpack_int4(words, dim=0, length=length)


def test_unpacking_refuses_another_dtype_than_int32() -> None:
    with pytest.raises(ValueError, match="must be int32"):
        unpack_int4(torch.zeros(2, dtype=torch.int64), dim=0, length=16)


@pytest.mark.parametrize(
    ("scales", "zeros", "message"),
    [((8, 3), (8, 3), "3 groups do not divide 32"), ((8, 2), (8, 1), "must both be"), ((4, 2), (4, 2), "must both be")],
)
def test_shapes_that_do_not_fit_are_refused(scales: tuple[int, int], zeros: tuple[int, int], message: str) -> None:
    integers = torch.zeros(8, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        pack_compressed_tensors(integers, torch.ones(scales), torch.full(zeros, 8, dtype=torch.uint8))


def test_an_empty_tensor_packs_to_nothing() -> None:
    assert pack_int4(torch.empty(4, 0, dtype=torch.uint8), dim=1).shape == (4, 0)
