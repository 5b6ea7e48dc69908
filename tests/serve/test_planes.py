"""A stored module becomes exactly the kernels' weight, or there is a reason why not."""

from __future__ import annotations

import pytest
import torch
from quant_fairness_kernels.dequantize import dequantize_planes
from quant_fairness_kernels.packing import pack_awq, pack_compressed_tensors, pack_gptq
from torch import Tensor

from quant_fairness_plugin.checkpoint.dense_modules import Layout, dense_weight
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.serve.planes import reason_against, stored_planes

LAYOUTS: tuple[Layout, ...] = ("compressed-tensors", "gptq", "gptq_v2", "awq")


def stored(layout: Layout, *, rows: int = 24, cols: int = 96, groups: int = 3, bits: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, groups, generator=generator).half()
    if layout == "compressed-tensors":
        packed = pack_compressed_tensors(integers, scales, zeros, bits=bits, symmetric=False)._asdict()
        return {suffix: tensor for suffix, tensor in packed.items() if tensor is not None}
    if layout == "awq":
        return dict(pack_awq(integers, scales, zeros)._asdict())
    if layout == "gptq_v2":  # zero points as they are: what version 1 stores for one more
        return dict(pack_gptq(integers, scales, (zeros + 1) % 2**bits, bits=bits)._asdict())
    return dict(pack_gptq(integers, scales, zeros, bits=bits)._asdict())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_values_are_those_of_the_independent_reading(layout: Layout, groups: int) -> None:
    parts = stored(layout, groups=groups)
    assert reason_against(parts, layout) is None
    assert torch.equal(dequantize_planes(stored_planes(parts, layout)), dense_weight("m", parts, layout))


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_act_order_is_followed(layout: Layout) -> None:
    parts = stored(layout)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)) % 3
    parts["g_idx" if layout == "gptq" else "weight_g_idx"] = order.int()
    assert reason_against(parts, layout) is None
    assert torch.equal(dequantize_planes(stored_planes(parts, layout)), dense_weight("m", parts, layout))
    uneven = order.clone()
    uneven[order == 0] = 1
    parts["g_idx" if layout == "gptq" else "weight_g_idx"] = uneven.int()
    assert reason_against(parts, layout) == "its act-order groups differ in size"


def test_scales_that_a_loader_widened_are_narrowed_without_rounding() -> None:
    parts = stored("gptq")
    wide = parts | {"scales": parts["scales"].float()}
    assert stored_planes(wide, "gptq").dtype == torch.float16
    as_bfloat16 = parts | {"scales": torch.full((3, 24), 2.0**20)}
    assert stored_planes(as_bfloat16, "gptq").dtype == torch.bfloat16
    assert reason_against(parts | {"scales": torch.full((3, 24), 1 / 3)}, "gptq") == "its scales are no 16-bit numbers"


def test_the_type_of_the_scales_can_be_asked_for() -> None:
    parts = stored("awq")
    assert stored_planes(parts, "awq", dtype=torch.bfloat16).dtype == torch.bfloat16
    large = parts | {"scales": torch.full((3, 24), 2.0**20, dtype=torch.bfloat16)}
    with pytest.raises(ArtifactError, match=r"not finite in torch\.float16\. Use bfloat16"):
        stored_planes(large, "awq", dtype=torch.float16)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_what_the_kernels_do_not_compute(layout: Layout) -> None:
    assert reason_against(stored(layout, bits=8), layout) == "it does not have 4 bits"
    assert reason_against(stored(layout, groups=6), layout) == "groups of 16 channels are no multiple of 32"


def test_tensors_that_are_missing_or_do_not_fit_are_refused() -> None:
    parts = stored("gptq")
    with pytest.raises(ArtifactError, match="tensor 'qzeros' of a quantized module is missing"):
        reason_against({suffix: tensor for suffix, tensor in parts.items() if suffix != "qzeros"}, "gptq")
    with pytest.raises(ArtifactError, match="tensors of a quantized module do not fit together"):
        stored_planes(parts | {"qweight": parts["qweight"][:, :16]}, "gptq")
