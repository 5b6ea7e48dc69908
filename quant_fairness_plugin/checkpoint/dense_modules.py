"""One quantized module read in the plainest way: its tensors in, its float32 weight `[rows, cols]` out.

Knows the layouts that public tools write: `compressed-tensors` (packed integers of 4 and 8 bits; 8-bit integers and
floats as they are; NVFP4 and MXFP4), `gptq` versions 1 and 2 (AutoGPTQ, gptqmodel, AutoRound, optimum; act-order
through `g_idx`), `awq` gemm (AutoAWQ, gptqmodel, AutoRound), `fp8` in blocks, and `bitsandbytes` (NF4, FP4, 8 bits).
How a module is stored is read from its tensors, so modules of several kinds stand side by side. Shares no code with the
packing that writes our files, nor with any loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from quant_fairness_plugin.documents import parse_json
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError

Layout = Literal["compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "bitsandbytes"]
READ = "compressed-tensors, gptq, awq, fp8, bitsandbytes"
"""Values of `quant_method` that are read."""
MARKERS: Mapping[Layout, tuple[str, ...]] = {
    "compressed-tensors": ("weight_packed", "weight_scale"),
    "gptq": ("qweight",),
    "gptq_v2": ("qweight",),
    "awq": ("qweight",),
    "fp8": ("weight_scale_inv",),
    "bitsandbytes": ("weight.absmax", "SCB"),
}
"""Suffixes of tensors of which a quantized module has one, and no other module has any."""
WORD_BITS = 32
_BITS = (4, 8)
_CT_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a float of 4 bits; the highest bit is its sign."""
_E8M0_BIAS = 127
_BNB_STATE = "weight.quant_state.bitsandbytes__"
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word of an `awq` file holds column `8c + _AWQ_ORDER[i]`."""


def tensor_layout(quantization: Mapping[str, Any]) -> Layout:
    """Which layout the metadata announces.

    Raises:
        UnsupportedModelError: a method or a layout of it that is not read here (GEMV, Marlin, …); names it.
    """
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors_layout(quantization)
    if method == "gptq":
        return _gptq_layout(quantization)
    if method == "awq":
        version = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm")
        if version.lower() != "gemm":
            raise _unknown(f"awq version {version!r}", "gemm")
        return "awq"
    if method == "fp8":
        return "fp8"
    if method == "bitsandbytes":
        return "bitsandbytes"
    raise _unknown(f"quant_method {method!r}", READ)


def dense_weight(module: str, parts: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """One module's weight `[rows, cols]` in float32: `(integer - zero point) * scale`.

    Args:
        module: its name, for messages.
        parts: its tensors by suffix (`qweight`, `weight_scale`, …), without the bias.
        layout: how they are packed.

    Raises:
        ArtifactError: tensors that are missing or do not fit together.
    """
    try:
        if layout == "compressed-tensors":
            return _compressed_tensors(parts)
        if layout == "awq":
            return _awq(parts)
        if layout == "fp8":
            return _scaled(parts["weight"].float(), parts["weight_scale_inv"].float())
        if layout == "bitsandbytes":
            return _bitsandbytes(parts)
        return _gptq(parts, zero_offset=1 if layout == "gptq" else 0)
    except (KeyError, RuntimeError, IndexError, ValueError, ZeroDivisionError, StopIteration) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else " ".join(str(err).split())
        raise ArtifactError(f"{module}: its tensors do not fit together ({reason}). Export again.") from err


def _compressed_tensors_layout(quantization: Mapping[str, Any]) -> Layout:
    """Refuse what would be read wrongly without a word: other formats, sparse ones among them, and other widths."""
    groups = list((quantization.get("config_groups") or {}).values())
    sparse = (quantization.get("sparsity_config") or {}).get("format")
    for form in (quantization.get("format"), *(group.get("format") for group in groups), sparse):
        if form is not None and form not in _CT_FORMATS:
            raise _unknown(f"compressed-tensors format {form!r}", ", ".join(_CT_FORMATS))
    if quantization.get("transform_config"):
        raise _unknown(
            "compressed-tensors with a transform_config", "formats whose weights are used as they are stored"
        )
    for weights in (group.get("weights") or {} for group in groups):
        if weights.get("type", "int") == "int" and weights.get("num_bits", 4) not in _BITS:
            raise _unknown(f"compressed-tensors of {weights['num_bits']} bits", "integers of 4 or 8 bits")
    return "compressed-tensors"


def _gptq_layout(quantization: Mapping[str, Any]) -> Layout:
    """AutoGPTQ wrote no `checkpoint_format` for a long time: absent is version 1."""
    bits = quantization.get("bits", 4)
    if bits not in _BITS:
        raise _unknown(f"gptq of {bits} bits", "4 and 8 bits")
    named = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    if quantization.get("is_marlin_format"):
        named = "marlin"
    if named == "gptq":
        return "gptq"
    if named == "gptq_v2":
        return "gptq_v2"
    raise _unknown(f"gptq checkpoint_format {named!r}", "gptq (version 1), gptq_v2")


def _unknown(what: str, allowed: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} cannot be dequantized here; allowed: {allowed}. Export in one of these.")


def _gptq(parts: Mapping[str, Tensor], *, zero_offset: int) -> Tensor:
    """Packed along the input features; version 1 stores zero points minus one, and 0 as the largest integer."""
    scales = parts["scales"].float().t()
    bits = _bits(words=parts["qzeros"].shape[1], integers=scales.shape[0])
    integers = _unpack(parts["qweight"].t(), bits)
    zeros = ((_unpack(parts["qzeros"], bits).int() + zero_offset) % 2**bits).t()
    return _values(integers, zeros, scales, parts.get("g_idx"))


def _awq(parts: Mapping[str, Tensor]) -> Tensor:
    """Packed along the output features, in the order that a word's nibbles have in `awq` gemm; transposed as gptq."""
    scales = parts["scales"].float()
    bits = _bits(words=parts["qweight"].shape[1], integers=scales.shape[1])
    if bits != 4:
        raise ValueError(f"{bits} bits, and awq gemm has 4")
    integers, zeros = (_in_awq_order(parts[name]) for name in ("qweight", "qzeros"))
    return _values(integers.t(), zeros.t(), scales.t())


def _compressed_tensors(parts: Mapping[str, Tensor]) -> Tensor:
    if "weight_packed" not in parts:
        zeros = parts.get("weight_zero_point")
        scales = _exponents(parts["weight_scale"])
        return _scaled(parts["weight"].float(), scales, None if zeros is None else zeros.float())
    if parts["weight_packed"].dtype == torch.uint8:
        return _packed_floats(parts)
    rows, cols = parts["weight_shape"].tolist()
    bits = _bits(words=parts["weight_packed"].shape[1], integers=cols)
    integers = _unpack(parts["weight_packed"], bits)[:, :cols]
    scales = parts["weight_scale"].float()
    if scales.shape[0] != rows:
        raise ValueError(f"{scales.shape[0]} rows of scales for {rows} rows")
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = _unpack(parts["weight_zero_point"].t(), bits)[:, :rows].t()
    return _values(integers, zeros, scales, parts.get("weight_g_idx"))


def _scaled(values: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Numbers times scales of the whole tensor, of rows, of groups in a row, or of blocks, the last one perhaps cut."""
    return (values - _spread(zeros, values.shape)) * _spread(scales, values.shape)


def _spread(scales: Tensor | None, shape: torch.Size) -> Tensor:
    """One scale for each number."""
    if scales is None:
        return torch.zeros(())
    if scales.numel() == 1:
        return scales.reshape(())
    spread = scales.reshape(len(scales), -1)
    for axis in (0, 1):
        size = _block(shape[axis], spread.shape[axis])
        spread = spread.repeat_interleave(size, dim=axis).narrow(axis, 0, shape[axis])
    return spread


def _block(numbers: int, scales: int) -> int:
    """How many numbers share a scale: all, or a power of two, of which the last block may be cut."""
    sizes = [numbers] if scales == 1 else [2**i for i in range(10) if -(-numbers // 2**i) == scales]
    if len(sizes) != 1:
        raise ValueError(f"{scales} scales for {numbers} numbers")
    return sizes[0]


def _packed_floats(parts: Mapping[str, Tensor]) -> Tensor:
    """NVFP4 (scales are FP8, over one of the tensor), MXFP4 (scales are exponents); two numbers a byte, low first."""
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    magnitudes = torch.tensor(_FP4)[codes & 7]
    values = torch.where(codes >= 8, -magnitudes, magnitudes)
    if scales.dtype == torch.uint8:
        return _scaled(values, _exponents(scales))
    return _scaled(values, scales.float() / parts["weight_global_scale"].float())


def _exponents(scales: Tensor) -> Tensor:
    """Scales in float32; of the MX formats bytes hold their exponents."""
    return torch.exp2(scales.float() - _E8M0_BIAS) if scales.dtype == torch.uint8 else scales.float()


def _bitsandbytes(parts: Mapping[str, Tensor]) -> Tensor:
    """8 bits with a scale a row, or codes of 4 bits, high first, of a table, times the largest value of each block."""
    if "SCB" in parts:
        return parts["weight"].float() * parts["SCB"].float()[:, None] / 127
    state = next(parse_json(bytes(parts[name].tolist()).decode()) for name in parts if name.startswith(_BNB_STATE))
    packed = parts["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()
    largest = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        table, coarse = parts["weight.nested_quant_map"].float(), parts["weight.nested_absmax"].float()
        size = state["nested_blocksize"]
        spread = coarse.repeat_interleave(size)[: largest.numel()]
        largest = table[largest.long()] * spread + state["nested_offset"]
    values = parts["weight.quant_map"].float()[codes]
    spread = largest.float().repeat_interleave(state["blocksize"])[: values.numel()]
    rows, cols = state["shape"]
    return (values * spread)[: rows * cols].reshape(rows, cols)


def _values(integers: Tensor, zeros: Tensor, scales: Tensor, group: Tensor | None = None) -> Tensor:
    """`(integer - zero point) * scale`, float32 `[rows, cols]`, in the memory of the result and little more.

    Args:
        integers: `[rows, cols]`.
        zeros: `[rows, groups]`.
        scales: float32 `[rows, groups]`.
        group: of every input feature; None where groups are in order.
    """
    (rows, cols), groups = integers.shape, scales.shape[1]
    # A difference of small integers is exact in float32.
    values, zeros = integers.to(torch.float32, memory_format=torch.contiguous_format), zeros.float()
    if group is None:
        if cols % groups:
            raise ValueError(f"{groups} groups do not divide {cols} input features")
        by_group = values.view(rows, groups, cols // groups)
        by_group.sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2))
        return values
    if group.shape != (cols,) or int(group.min()) < 0:
        raise ValueError(f"g_idx of shape {list(group.shape)} for {cols} input features")
    return values.sub_(zeros[:, group.long()]).mul_(scales[:, group.long()])


def _bits(*, words: int, integers: int) -> int:
    """How wide integers are of which so many fill so many words."""
    for bits in _BITS:
        if -(-integers * bits // WORD_BITS) == words:
            return bits
    raise ValueError(f"{integers} integers in {words} words of 32 bits are neither of 4 bits nor of 8")


def _in_awq_order(words: Tensor) -> Tensor:
    nibbles = _unpack(words, 4).reshape(*words.shape, len(_AWQ_ORDER))
    ordered = torch.empty_like(nibbles)
    ordered[..., list(_AWQ_ORDER)] = nibbles
    return ordered.flatten(-2)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The integers of each word of the last dimension, lowest bits first, as uint8."""
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers are {words.dtype}, expected torch.int32")
    # One place after the other, each narrowed at once: all of them as words would be four times the result.
    places = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in range(0, WORD_BITS, bits)]
    return torch.stack(places, dim=-1).flatten(-2)
