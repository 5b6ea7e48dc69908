"""The kernels' layout: what goes in comes out, from every checkpoint format, and each word holds what it should."""

from __future__ import annotations

import pytest
import torch
from quant_fairness_kernels.dequantize import dequantize_planes
from quant_fairness_kernels.naive import naive_dequantize
from quant_fairness_kernels.nibble_planes import (
    NibblePlanes,
    clear_channels,
    concatenate_planes,
    interleave_planes,
    kernel_group,
    pack_planes,
    planes_from_gptq,
    unpack_planes,
)
from quant_fairness_kernels.packing import (
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    unpack_awq,
    unpack_compressed_tensors,
)
from torch import Tensor

from tests.kernels.weights import PlainWeight, plain_weight, shuffled_groups

SHAPES = [(1, 32, 1), (17, 64, 2), (33, 96, 3), (129, 160, 5), (128, 128, 1), (130, 256, 2), (63, 300, 1), (5, 768, 3)]


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("N", "K", "groups"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_is_exact(N: int, K: int, groups: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = plain_weight(N, K, groups, symmetric=symmetric, dtype=dtype)
    planes = pack_planes(*weight)
    assert planes.symmetric == symmetric
    assert same(unpack_planes(planes), weight)


@pytest.mark.parametrize("groups", [3, 6, 12])
def test_act_order_round_trip_is_exact(groups: int) -> None:
    weight, index = plain_weight(40, 384, groups, symmetric=False), shuffled_groups(384, groups)
    planes = pack_planes(*weight, group_index=index)
    assert planes.permutation is not None
    assert same(unpack_planes(planes), weight)
    assert torch.equal(dequantize_planes(planes), naive_dequantize(*weight, group_index=index, dtype=torch.float32))


def test_each_word_holds_one_row_of_four_planes() -> None:
    weight = plain_weight(3, 200, 1, symmetric=False)
    words = pack_planes(*weight).words
    assert words.shape == (64, 128)
    padded = torch.cat([weight.integers, weight.zeros.expand(3, 56)], dim=1).tolist()
    for block, row, feature in [(0, 0, 0), (0, 31, 2), (1, 0, 1), (1, 7, 2), (1, 31, 0)]:
        nibbles = [padded[feature][128 * block + 32 * plane + row] for plane in range(4)]
        expected = sum(nibble << (4 * plane) for plane, nibble in enumerate(nibbles))
        assert words[32 * block + row, feature].item() & 0xFFFF == expected


def test_scale_words_of_both_kinds() -> None:
    symmetric, zeros = plain_weight(4, 64, 2), plain_weight(4, 64, 2, symmetric=False)
    halves = pack_planes(*symmetric).scales.view(torch.float16)
    assert halves.shape == (4, 128)
    assert torch.equal(halves[:2, :4], symmetric.scales.T)
    words = pack_planes(*zeros).scales
    assert words.shape == (4, 128)
    assert torch.equal(words[:2, :4].contiguous().view(torch.float16)[:, 0::2], zeros.scales.T)
    assert torch.equal(words[:2, :4].contiguous().view(torch.float16)[:, 1::2], zeros.zeros.T.half())


def test_padding_weighs_nothing() -> None:
    weight = plain_weight(5, 160, 5, symmetric=False)
    planes = pack_planes(*weight)
    whole = NibblePlanes(planes.words, planes.scales, None, planes.counters, 128, 256, 8, False, torch.float16)
    expected = torch.zeros(128, 256)
    expected[:5, :160] = naive_dequantize(*weight, dtype=torch.float32)
    assert torch.equal(dequantize_planes(whole), expected)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_files_of_both_versions(version: int, act_order: bool) -> None:
    weight = plain_weight(16, 96, 3, symmetric=False)
    tensors = pack_gptq(*weight)
    if version == 2:
        wrapped = PlainWeight(weight.integers, weight.scales, ((weight.zeros.int() + 1) % 16).to(torch.uint8))
        tensors = tensors._replace(qzeros=pack_gptq(*wrapped).qzeros)
    index = shuffled_groups(96, 3).to(torch.int32) if act_order else tensors.g_idx
    planes = planes_from_gptq(tensors._replace(g_idx=index), version=version)
    assert same(unpack_planes(planes), weight)
    assert torch.equal(dequantize_planes(planes), naive_dequantize(*weight, group_index=index, dtype=torch.float32))


def test_awq_and_compressed_tensors_files() -> None:
    weight = plain_weight(24, 128, 4, symmetric=False)
    assert same(unpack_planes(pack_planes(*unpack_awq(pack_awq(*weight)))), weight)
    stored = pack_compressed_tensors(*weight, symmetric=False)
    assert same(unpack_planes(pack_planes(*unpack_compressed_tensors(stored))), weight)


@pytest.mark.parametrize("symmetric", [(True, True), (True, False)])
def test_concatenated_weights_are_one_after_the_other(symmetric: tuple[bool, bool]) -> None:
    parts = [plain_weight(N, 96, 3, symmetric=s, seed=N) for N, s in zip((20, 7), symmetric, strict=True)]
    together = unpack_planes(concatenate_planes([pack_planes(*part) for part in parts]))
    assert same(together, tuple(torch.cat(pair) for pair in zip(*parts, strict=True)))


def test_concatenated_act_order_keeps_the_permutation() -> None:
    index = shuffled_groups(96, 3)
    parts = [plain_weight(N, 96, 3, symmetric=False, seed=N) for N in (20, 7)]
    together = concatenate_planes([pack_planes(*part, group_index=index) for part in parts])
    expected = torch.cat([naive_dequantize(*part, group_index=index, dtype=torch.float32) for part in parts])
    assert torch.equal(dequantize_planes(together), expected)


def test_interleaved_weights_alternate() -> None:
    gate, up = plain_weight(9, 64, 2, seed=1), plain_weight(9, 64, 2, seed=2)
    weight = dequantize_planes(interleave_planes(pack_planes(*gate), pack_planes(*up)))
    assert torch.equal(weight[0::2], naive_dequantize(*gate, dtype=torch.float32))
    assert torch.equal(weight[1::2], naive_dequantize(*up, dtype=torch.float32))


def test_what_cannot_share_a_launch_is_refused() -> None:
    one = pack_planes(*plain_weight(8, 64, 2))
    with pytest.raises(ValueError, match="no weights"):
        concatenate_planes([])
    with pytest.raises(ValueError, match=r"96, 3, torch.float16 and 64, 2, torch.float16 cannot share"):
        concatenate_planes([one, pack_planes(*plain_weight(8, 96, 3))])
    with pytest.raises(ValueError, match="different act-order permutations"):
        concatenate_planes([one, pack_planes(*plain_weight(8, 64, 2), group_index=shuffled_groups(64, 2))])
    with pytest.raises(ValueError, match="gate has 8 features and up has 9"):
        interleave_planes(one, pack_planes(*plain_weight(9, 64, 2)))


def test_cleared_channels_weigh_nothing_and_others_are_kept() -> None:
    weight, index = plain_weight(6, 96, 3, symmetric=False), torch.tensor([0, 40, 95])
    cleared = naive_dequantize(clear_channels(weight.integers, weight.zeros, index), weight.scales, weight.zeros)
    expected = naive_dequantize(*weight)
    expected[:, index] = 0
    assert torch.equal(cleared, expected)


@pytest.mark.parametrize(("size", "stored"), [(32, 32), (64, 64), (96, 32), (128, 128), (192, 64), (256, 128)])
def test_groups_that_are_multiples_of_32_are_stored_as_groups_the_kernel_knows(size: int, stored: int) -> None:
    assert kernel_group(2 * size, 2) == stored


@pytest.mark.parametrize(
    ("K", "groups", "message"),
    [(100, 3, "3 groups do not divide K = 100"), (96, 6, "groups of 16 channels are not supported")],
)
def test_other_groups_are_refused(K: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_group(K, groups)


def test_bad_tensors_are_refused() -> None:
    integers, scales, zeros = plain_weight(4, 64, 2)
    with pytest.raises(ValueError, match="scales are torch.float32"):
        pack_planes(integers, scales.float(), zeros)
    with pytest.raises(ValueError, match=r"integers must be whole numbers in 0..15, got torch.uint8 up to 16"):
        pack_planes(integers.clone().fill_(16), scales, zeros)
    with pytest.raises(ValueError, match=r"scales \[4, 2\] and zeros \[4, 1\] both"):
        pack_planes(integers, scales, zeros[:, :1])
    with pytest.raises(ValueError, match="empty weight"):
        pack_planes(integers[:0], scales[:0], zeros[:0])
    with pytest.raises(ValueError, match="groups of 31 to 33 channels"):
        pack_planes(integers, scales, zeros, group_index=torch.arange(64) // 33)
    with pytest.raises(ValueError, match="one of 2 groups to each of 64 channels"):
        pack_planes(integers, scales, zeros, group_index=torch.arange(64) // 31)
    with pytest.raises(ValueError, match="unknown gptq checkpoint version 3"):
        planes_from_gptq(pack_gptq(*plain_weight(8, 64, 2)), version=3)
