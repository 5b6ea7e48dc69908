"""One quantized module read in the plainest way: its tensors in, its float32 weight `[rows, cols]` out.

Knows the layouts that the public tools write: `compressed-tensors` pack-quantized, `gptq` versions 1 and 2 (AutoGPTQ,
gptqmodel, AutoRound, optimum; act-order through `g_idx`) and `awq` gemm (AutoAWQ, gptqmodel, AutoRound). How many bits
a module has is read from the shapes of its tensors, so modules of 4 and 8 bits stand side by side. Shares no code with
the packing that writes our files, nor with any loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError

Layout = Literal["compressed-tensors", "gptq", "gptq_v2", "awq"]
WORD_BITS = 32
_BITS = (4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word of an `awq` file holds column `8c + _AWQ_ORDER[i]`."""


def tensor_layout(quantization: Mapping[str, Any]) -> Layout:
    """Which layout the metadata announces.

    Raises:
        UnsupportedModelError: a method or a layout of it that is not read here (GEMV, Marlin, …); names it.
    """
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return "compressed-tensors"
    if method == "gptq":
        return _gptq_layout(quantization)
    if method == "awq":
        version = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm")
        if version.lower() != "gemm":
            raise _unknown(f"awq version {version!r}", "gemm")
        return "awq"
    raise _unknown(f"quant_method {method!r}", "compressed-tensors, gptq, awq")


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
        return _gptq(parts, zero_offset=1 if layout == "gptq" else 0)
    except (KeyError, RuntimeError, IndexError, ValueError, ZeroDivisionError) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else " ".join(str(err).split())
        raise ArtifactError(f"{module}: its tensors do not fit together ({reason}). Export again.") from err


def _gptq_layout(quantization: Mapping[str, Any]) -> Layout:
    """AutoGPTQ wrote no `checkpoint_format` for a long time: absent is version 1."""
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
    zeros = ((_unpack(parts["qzeros"], bits) + zero_offset) % 2**bits).t()
    group = parts["g_idx"].long() if "g_idx" in parts else _groups(integers.shape[1], scales.shape[1])
    if group.shape != (integers.shape[1],) or int(group.min()) < 0:
        raise ValueError(f"g_idx of shape {list(group.shape)} for {integers.shape[1]} input features")
    return _values(integers, zeros[:, group], scales[:, group])


def _awq(parts: Mapping[str, Tensor]) -> Tensor:
    """Packed along the output features, in the order that a word's nibbles have in `awq` gemm; transposed as gptq."""
    scales = parts["scales"].float()
    bits = _bits(words=parts["qweight"].shape[1], integers=scales.shape[1])
    if bits != 4:
        raise ValueError(f"{bits} bits, and awq gemm has 4")
    integers, zeros = (_in_awq_order(parts[name]) for name in ("qweight", "qzeros"))
    group = _groups(integers.shape[0], scales.shape[0])
    return _values(integers, zeros[group], scales[group]).t().contiguous()


def _compressed_tensors(parts: Mapping[str, Tensor]) -> Tensor:
    rows, cols = parts["weight_shape"].tolist()
    bits = _bits(words=parts["weight_packed"].shape[1], integers=cols)
    integers = _unpack(parts["weight_packed"], bits)[:, :cols]
    scales = parts["weight_scale"].float()
    if scales.shape[0] != rows:
        raise ValueError(f"{scales.shape[0]} rows of scales for {rows} rows")
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = _unpack(parts["weight_zero_point"].t(), bits)[:, :rows].t()
    group = parts["weight_g_idx"].long() if "weight_g_idx" in parts else _groups(cols, scales.shape[1])
    return _values(integers, zeros[:, group], scales[:, group])


def _values(integers: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    return (integers - zeros).float() * scales


def _bits(*, words: int, integers: int) -> int:
    """How wide integers are of which so many fill so many words."""
    for bits in _BITS:
        if -(-integers * bits // WORD_BITS) == words:
            return bits
    raise ValueError(f"{integers} integers in {words} words of 32 bits are neither of 4 bits nor of 8")


def _groups(cols: int, groups: int) -> Tensor:
    """The group of every input feature, where groups are in order."""
    if cols % groups:
        raise ValueError(f"{groups} groups do not divide {cols} input features")
    return torch.arange(cols) // (cols // groups)


def _in_awq_order(words: Tensor) -> Tensor:
    nibbles = _unpack(words, 4).reshape(*words.shape, len(_AWQ_ORDER))
    ordered = torch.empty_like(nibbles)
    ordered[..., list(_AWQ_ORDER)] = nibbles
    return ordered.flatten(-2)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The integers of each word of the last dimension, lowest bits first."""
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers are {words.dtype}, expected torch.int32")
    return torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, WORD_BITS, bits)], dim=-1).flatten(-2)
