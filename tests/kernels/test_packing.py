"""Bit layouts: round trips are exact, and every word is the one that a loop over Python integers builds."""

from __future__ import annotations

import pytest
import torch
from quant_fairness_kernels.packing import (
    GptqTensors,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    pack_integers,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
    unpack_integers,
)
from torch import Tensor

SIZES = (1, 7, 8, 9, 17, 33, 63, 64)


def random_module(
    rows: int, cols: int, groups: int, *, symmetric: bool, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    integers = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, groups, generator=generator).to(torch.float16)
    random_zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    return integers, scales, torch.full_like(random_zeros, 2 ** (bits - 1)) if symmetric else random_zeros


def naive_word(values: list[int], bits: int = 4) -> int:
    """Integers as the signed 32-bit integer that holds them, the first in the lowest bits."""
    filled = values + [0] * (32 // bits - len(values))
    digits = "".join(f"{value:0{bits // 4}x}" for value in reversed(filled))
    return int.from_bytes(bytes.fromhex(digits), "big", signed=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("cols", SIZES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_round_trip_is_exact_at_every_size(rows: int, cols: int, dim: int, bits: int) -> None:
    values, _, _ = random_module(rows, cols, 1, symmetric=True, bits=bits)
    back = unpack_integers(pack_integers(values, bits=bits, dim=dim), bits=bits, dim=dim, length=values.shape[dim])
    assert back.dtype == torch.uint8
    assert torch.equal(back, values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", SIZES)
def test_words_equal_a_loop_over_python_integers(cols: int, bits: int) -> None:
    values, _, _ = random_module(5, cols, 1, symmetric=True, bits=bits)
    count = 32 // bits
    expected = [
        [naive_word(row[start : start + count], bits) for start in range(0, cols, count)] for row in values.tolist()
    ]
    assert pack_integers(values, bits=bits, dim=1).tolist() == expected


@pytest.mark.parametrize("bits", [3, 16])
def test_a_width_that_no_format_stores_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit integers are stored by no format"):
        pack_integers(torch.zeros(8, dtype=torch.int32), bits=bits, dim=0)


def test_the_highest_nibble_makes_the_word_negative_and_still_comes_back() -> None:
    values = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert pack_integers(values, bits=4, dim=1).item() == -(2**28)
    assert torch.equal(unpack_integers(pack_integers(values, bits=4, dim=1), bits=4, dim=1, length=8), values)


def test_a_transposed_view_packs_like_its_copy() -> None:
    values, _, _ = random_module(16, 24, 1, symmetric=True)
    assert torch.equal(pack_integers(values.t(), bits=4, dim=0), pack_integers(values.t().contiguous(), bits=4, dim=0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("symmetric", "groups"), [(True, 1), (True, 3), (False, 3), (False, 6)])
def test_gptq_round_trip_is_exact(symmetric: bool, groups: int, bits: int) -> None:
    module = random_module(16, 96, groups, symmetric=symmetric, bits=bits)
    for got, expected in zip(unpack_gptq(pack_gptq(*module, bits=bits), bits=bits), module, strict=True):
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


def test_gptq_stores_four_8_bit_integers_to_a_word() -> None:
    integers, scales, zeros = random_module(16, 96, 3, symmetric=True, bits=8)
    tensors = pack_gptq(integers, scales, zeros, bits=8)
    assert tensors.qweight.shape == (24, 16)
    assert tensors.qweight[2, 5].item() == naive_word(integers[5, 8:12].tolist(), 8)
    assert tensors.qzeros.shape == (3, 4)
    assert set(tensors.qzeros.flatten().tolist()) == {0x7F7F7F7F}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "cols", "groups"), [(8, 8, 1), (24, 96, 3), (64, 40, 5)])
def test_awq_round_trip_is_exact(rows: int, cols: int, groups: int, symmetric: bool) -> None:
    module = random_module(rows, cols, groups, symmetric=symmetric)
    for got, expected in zip(unpack_awq(pack_awq(*module)), module, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_awq_stores_the_values_that_the_field_reads() -> None:
    integers, scales, zeros = random_module(24, 96, 3, symmetric=False)
    tensors = pack_awq(integers, scales, zeros)
    assert [list(tensor.shape) for tensor in tensors] == [[96, 3], [3, 3], [3, 24]]
    # Output channels of a word, lowest bits first: even ones, then odd ones.
    order = [8, 10, 12, 14, 9, 11, 13, 15]
    assert tensors.qweight[5, 1].item() == naive_word([int(integers[n, 5]) for n in order])
    assert tensors.qzeros[2, 1].item() == naive_word([int(zeros[n, 2]) for n in order])
    assert tensors.scales[1, 4] == scales[4, 1]


def test_awq_stores_the_zero_points_of_a_symmetric_grid_as_they_are() -> None:
    assert set(pack_awq(*random_module(8, 32, 1, symmetric=True)).qzeros.flatten().tolist()) == {0x88888888 - 2**32}


def test_awq_undoes_with_the_order_that_readers_use() -> None:
    """The loaders' own inverse, `[0, 4, 1, 5, 2, 6, 3, 7]`, gives the integers back in order."""
    integers, scales, zeros = random_module(16, 8, 1, symmetric=True)
    words = pack_awq(integers, scales, zeros).qweight
    nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1)
    assert torch.equal(nibbles[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1).t().to(torch.uint8), integers)


@pytest.mark.parametrize("shape", [(12, 16), (16, 12)])
def test_awq_refuses_sizes_that_do_not_fill_words(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"awq packs 8 .* \[1[26], 1[26]\] must be multiples of 8"):
        pack_awq(*random_module(*shape, 1, symmetric=True))


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
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_round_trip_is_exact(rows: int, cols: int, groups: int, symmetric: bool, bits: int) -> None:
    module = random_module(rows, cols, groups, symmetric=symmetric, bits=bits)
    tensors = pack_compressed_tensors(*module, bits=bits, symmetric=symmetric)
    assert tensors.weight_shape.tolist() == [rows, cols]
    for got, expected in zip(unpack_compressed_tensors(tensors, bits=bits), module, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "groups"), [(17, 64, 2), (33, 36, 3), (8, 32, 1)])
def test_compressed_tensors_words_equal_those_of_the_reference_package(
    rows: int, cols: int, groups: int, bits: int
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers, scales, zeros = random_module(rows, cols, groups, symmetric=False, bits=bits)
    tensors = pack_compressed_tensors(integers, scales, zeros, bits=bits, symmetric=False)
    signed, signed_zeros = ((x.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8) for x in (integers, zeros))
    assert torch.equal(tensors.weight_packed, pack_to_int32(signed, bits))
    assert tensors.weight_zero_point is not None
    assert torch.equal(tensors.weight_zero_point, pack_to_int32(signed_zeros, bits, packed_dim=0))


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
        pack_integers(values, bits=4, dim=0)


@pytest.mark.parametrize("length", [8, 17])
def test_unpacking_refuses_a_length_that_does_not_fit_the_words(length: int) -> None:
    words = pack_integers(torch.zeros(16, dtype=torch.uint8), bits=4, dim=0)
    with pytest.raises(ValueError, match=f"{length} integers need"):
        unpack_integers(words, bits=4, dim=0, length=length)


def test_unpacking_refuses_another_dtype_than_int32() -> None:
    with pytest.raises(ValueError, match="must be int32"):
        unpack_integers(torch.zeros(2, dtype=torch.int64), bits=4, dim=0, length=16)


@pytest.mark.parametrize(
    ("scales", "zeros", "message"),
    [((8, 3), (8, 3), "3 groups do not divide 32"), ((8, 2), (8, 1), "must both be"), ((4, 2), (4, 2), "must both be")],
)
def test_shapes_that_do_not_fit_are_refused(scales: tuple[int, int], zeros: tuple[int, int], message: str) -> None:
    integers = torch.zeros(8, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        pack_compressed_tensors(integers, torch.ones(scales), torch.full(zeros, 8, dtype=torch.uint8))


def test_an_empty_tensor_packs_to_nothing() -> None:
    assert pack_integers(torch.empty(4, 0, dtype=torch.uint8), bits=4, dim=1).shape == (4, 0)
