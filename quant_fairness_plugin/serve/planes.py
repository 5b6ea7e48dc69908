"""One stored module in the kernels' layout, or the reason why it has none.

Exact: `dequantize_planes` gives the float32 weight that `checkpoint.dense_modules` reads, without shared code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from quant_fairness_kernels.nibble_planes import NibblePlanes, pack_planes, planes_from_gptq
from quant_fairness_kernels.packing import (
    AwqTensors,
    CompressedTensors,
    GptqTensors,
    unpack_awq,
    unpack_compressed_tensors,
)
from torch import Tensor

from quant_fairness_plugin.checkpoint.dense_modules import Layout
from quant_fairness_plugin.checkpoint.formats import format_of_layout
from quant_fairness_plugin.errors import ArtifactError

KERNEL_BITS = 4
SMALLEST_GROUP = 32
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def reason_against(parts: Mapping[str, Tensor], layout: Layout) -> str | None:
    """Return why the kernels cannot compute with a stored module, as a clause; None if they can.

    Args:
        parts: its tensors by suffix, without the bias.
        layout: how they are packed.

    Raises:
        ArtifactError: a tensor is missing.
    """
    packed = parts.get("weight_packed")
    if layout in ("fp8", "bitsandbytes") or "weight" in parts or (packed is not None and packed.dtype != torch.int32):
        return "it holds no packed integers"
    try:
        grid = format_of_layout(layout).grid_of(parts)
    except KeyError as err:
        raise ArtifactError(f"tensor {err} of a quantized module is missing. Export again.") from err
    except ValueError:  # 2 or 3 bits, which some tools write
        return f"it does not have {KERNEL_BITS} bits"
    if grid.bits != KERNEL_BITS:
        return f"it does not have {KERNEL_BITS} bits"
    size = grid.cols // grid.groups
    if grid.groups > 1 and (grid.cols % grid.groups or size % SMALLEST_GROUP):
        return f"groups of {size} channels are no multiple of {SMALLEST_GROUP}"
    order = _group_index(parts)
    counts = None if order is None else torch.bincount(order.long(), minlength=grid.groups)
    if counts is not None and (len(counts) > grid.groups or bool((counts != size).any())):
        return "its act-order groups differ in size"
    if _exact_scales(_scales(parts)) is None:
        return "its scales are no 16-bit numbers"
    return None


def stored_planes(parts: Mapping[str, Tensor], layout: Layout, *, dtype: torch.dtype | None = None) -> NibblePlanes:
    """Return a module that `reason_against` has nothing against, in the kernels' layout, on the CPU.

    Args:
        parts: its tensors by suffix, without the bias.
        layout: how they are packed.
        dtype: 16-bit type of the scales, which the Triton kernels want to be that of the activations; None keeps the
            stored one, which is exact.

    Raises:
        ArtifactError: tensors that do not fit together, or scales that overflow in `dtype`.
    """
    here = {suffix: tensor.detach().cpu() for suffix, tensor in parts.items()}
    scales = _exact_scales(_scales(here))
    assert scales is not None  # says reason_against
    scales = scales if dtype is None else scales.to(dtype)
    if not bool(torch.isfinite(scales).all()):
        raise ArtifactError(f"the scales of a quantized module are not finite in {dtype}. Use bfloat16.")
    try:
        if layout == "compressed-tensors":
            return _from_compressed_tensors(here, scales)
        if layout == "awq":
            return pack_planes(*unpack_awq(AwqTensors(here["qweight"], here["qzeros"], scales)))
        grid = format_of_layout(layout).grid_of(here)
        in_order = torch.arange(grid.cols, dtype=torch.int32) // (grid.cols // grid.groups)
        tensors = GptqTensors(here["qweight"], here["qzeros"], scales, here.get("g_idx", in_order))
        return planes_from_gptq(tensors, version=2 if layout == "gptq_v2" else 1)
    except (ValueError, RuntimeError) as err:
        reason = " ".join(str(err).split())
        raise ArtifactError(f"tensors of a quantized module do not fit together ({reason}). Export again.") from err


def _from_compressed_tensors(parts: Mapping[str, Tensor], scales: Tensor) -> NibblePlanes:
    zeros = parts.get("weight_zero_point")
    tensors = CompressedTensors(parts["weight_packed"], scales, parts["weight_shape"], zeros)
    return pack_planes(*unpack_compressed_tensors(tensors), group_index=_group_index(parts))


def _group_index(parts: Mapping[str, Tensor]) -> Tensor | None:
    return parts.get("g_idx", parts.get("weight_g_idx"))


def _scales(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["scales"] if "scales" in parts else parts["weight_scale"]


def _exact_scales(scales: Tensor) -> Tensor | None:
    """The scales in a 16-bit type without rounding (a loader may have widened them); None if there is no such type."""
    if scales.dtype in SIXTEEN_BIT:
        return scales
    narrow = (scales.to(dtype) for dtype in SIXTEEN_BIT)
    return next((scale for scale in narrow if torch.equal(scale.to(scales.dtype), scales)), None)
