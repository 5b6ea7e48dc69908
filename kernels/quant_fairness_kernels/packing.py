"""Exact bit layouts of 4-bit checkpoint tensors: eight unsigned integers per int32, little endian, and back.

An int32 word holds eight consecutive integers along one dimension; integer `i` sits in bits `4i .. 4i + 3`. What
differs between the formats is the orientation, what becomes of the zero points, and whether an incomplete last word is
allowed. Every `pack_*` has an `unpack_*` that returns the very same integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PER_WORD = 8
"""4-bit integers in an int32."""
_LARGEST = 15


class GptqTensors(NamedTuple):
    """One module as a `gptq` (v1) checkpoint stores it. Tensor names on disk are the field names."""

    qweight: Tensor
    """int32 `[K/8, N]`: `qweight[r, n]` holds the integers `[n, 8r .. 8r+7]`."""
    qzeros: Tensor
    """int32 `[G, N/8]`: zero points minus one, packed along N. A zero point of 0 wraps to 15."""
    scales: Tensor
    """16-bit `[G, N]`."""
    g_idx: Tensor
    """int32 `[K]`: the group of every input channel."""


class CompressedTensors(NamedTuple):
    """One module as a `compressed-tensors` pack-quantized checkpoint stores it."""

    weight_packed: Tensor
    """int32 `[N, ceil(K/8)]`."""
    weight_scale: Tensor
    """16-bit `[N, G]`."""
    weight_shape: Tensor
    """int64 `[2]`: N and K."""
    weight_zero_point: Tensor | None
    """int32 `[ceil(N/8), G]`, packed along N; None for a symmetric grid, whose zero point is 8 everywhere."""


def pack_int4(values: Tensor, *, dim: int) -> Tensor:
    """Pack unsigned 4-bit integers along `dim`, eight to an int32; an incomplete last word is filled with zeros.

    Args:
        values: any integer dtype, `[..., length, ...]`, every value in 0..15.
        dim: the dimension that is packed.

    Returns:
        int32, with `ceil(length / 8)` in place of `length`.

    Raises:
        ValueError: a value outside 0..15, or a floating-point tensor.
    """
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"cannot pack {values.dtype}; integers in 0..{_LARGEST} are needed")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > _LARGEST):
        raise ValueError(f"cannot pack values {int(values.min())}..{int(values.max())} in 4 bits; allowed: 0..15")
    wide = values.to(torch.int64).movedim(dim, -1)
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[-1] % PER_WORD))
    wide = wide.reshape(*wide.shape[:-1], -1, PER_WORD)
    words = (wide << _shifts(wide)).sum(-1)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


def unpack_int4(words: Tensor, *, dim: int, length: int) -> Tensor:
    """Undo `pack_int4`.

    Args:
        words: int32, packed along `dim`.
        dim: the dimension that was packed.
        length: how many integers there were along `dim`; the filling of the last word is dropped.

    Returns:
        uint8 in 0..15, with `length` along `dim`.

    Raises:
        ValueError: not int32, or the words along `dim` are not exactly those that `length` integers need.
    """
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers must be int32, got {words.dtype}")
    if words.shape[dim] != -(-length // PER_WORD):
        raise ValueError(f"{length} integers need {-(-length // PER_WORD)} words, got {words.shape[dim]}")
    wide = words.to(torch.int64).movedim(dim, -1).unsqueeze(-1)
    nibbles = (wide >> _shifts(wide)) & _LARGEST
    flat = nibbles.reshape(*nibbles.shape[:-2], -1)[..., :length]
    return flat.to(torch.uint8).movedim(-1, dim).contiguous()


def pack_gptq(integers: Tensor, scales: Tensor, zeros: Tensor) -> GptqTensors:
    """Lay one module out as `gptq` version 1.

    Args:
        integers: uint8 `[N, K]` in 0..15; N and K multiples of 8, K a multiple of G.
        scales: 16-bit `[N, G]`.
        zeros: uint8 `[N, G]` in 0..15.

    Raises:
        ValueError: N or K is not a multiple of 8, or the shapes do not fit together.
    """
    N, K = integers.shape
    G = _groups(integers, scales, zeros)
    if N % PER_WORD or K % PER_WORD:
        raise ValueError(f"gptq packs eight to a word along both dimensions: [{N}, {K}] must be multiples of 8")
    return GptqTensors(
        qweight=pack_int4(integers.t(), dim=0),
        qzeros=pack_int4((zeros.t().to(torch.int64) - 1) & _LARGEST, dim=1),
        scales=scales.t().contiguous(),
        g_idx=(torch.arange(K) // (K // G)).to(torch.int32),
    )


def unpack_gptq(tensors: GptqTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_gptq`: integers uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`.

    Raises:
        ValueError: the shapes do not fit together, or `g_idx` permutes the groups (dynamic act-order).
    """
    K, N = tensors.qweight.shape[0] * PER_WORD, tensors.qweight.shape[1]
    G = tensors.scales.shape[0]
    if K % G or not torch.equal(tensors.g_idx.to(torch.int64), torch.arange(K) // (K // G)):
        raise ValueError(f"g_idx does not put {K} channels into {G} groups in order; act-order files are not supported")
    integers = unpack_int4(tensors.qweight, dim=0, length=K).t().contiguous()
    stored = unpack_int4(tensors.qzeros, dim=1, length=N).t()
    return integers, tensors.scales.t().contiguous(), ((stored + 1) & _LARGEST).contiguous()


def pack_compressed_tensors(
    integers: Tensor, scales: Tensor, zeros: Tensor, *, symmetric: bool = True
) -> CompressedTensors:
    """Lay one module out as `compressed-tensors` pack-quantized, which stores the signed integers plus 8.

    Args:
        integers: uint8 `[N, K]` in 0..15, K a multiple of G.
        scales: 16-bit `[N, G]`.
        zeros: uint8 `[N, G]`; all 8 if `symmetric`.
        symmetric: leave the zero points out of the file.

    Raises:
        ValueError: a symmetric grid with another zero point than 8, or the shapes do not fit together.
    """
    _groups(integers, scales, zeros)
    if symmetric and not bool((zeros == 8).all()):
        raise ValueError("a symmetric 4-bit grid has zero point 8 everywhere; pass symmetric=False to store others")
    return CompressedTensors(
        weight_packed=pack_int4(integers, dim=1),
        weight_scale=scales.contiguous(),
        weight_shape=torch.tensor(integers.shape, dtype=torch.int64),
        weight_zero_point=None if symmetric else pack_int4(zeros, dim=0),
    )


def unpack_compressed_tensors(tensors: CompressedTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_compressed_tensors`: integers uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`.

    Raises:
        ValueError: the packed tensors are not as long as `weight_shape` says.
    """
    N, K = (int(size) for size in tensors.weight_shape)
    integers = unpack_int4(tensors.weight_packed, dim=1, length=K)
    scales = tensors.weight_scale.contiguous()
    if tensors.weight_zero_point is None:
        return integers, scales, torch.full(scales.shape, 8, dtype=torch.uint8)
    return integers, scales, unpack_int4(tensors.weight_zero_point, dim=0, length=N)


def _shifts(like: Tensor) -> Tensor:
    return 4 * torch.arange(PER_WORD, device=like.device)


def _groups(integers: Tensor, scales: Tensor, zeros: Tensor) -> int:
    N, K = integers.shape
    if scales.shape != zeros.shape or scales.dim() != 2 or scales.shape[0] != N:
        raise ValueError(f"scales {list(scales.shape)} and zeros {list(zeros.shape)} must both be [{N}, groups]")
    G = int(scales.shape[1])
    if G == 0 or K % G:
        raise ValueError(f"{G} groups do not divide {K} columns")
    return G
