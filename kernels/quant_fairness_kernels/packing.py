"""Exact bit layouts of 4-bit and 8-bit checkpoint tensors: unsigned integers in int32 words, little endian, and back.

An int32 word holds eight 4-bit (or four 8-bit) integers that follow each other along one dimension; integer `i` sits in
bits `bits * i .. bits * (i + 1) - 1`. What differs between the formats is the orientation, the order within a word,
what becomes of the zero points, and whether an incomplete last word is allowed. Every `pack_*` has an `unpack_*` that
returns the very same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32
WIDTHS = (4, 8)
"""Bits of an integer that some checkpoint format stores."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""`awq` only: nibble i of a word holds the integer of output channel `8c + AWQ_ORDER[i]`."""


class GptqTensors(NamedTuple):
    """One module as a `gptq` (v1) checkpoint stores it. Tensor names on disk are the field names."""

    qweight: Tensor
    """int32 `[K/P, N]`, P integers a word: `qweight[r, n]` holds the integers `[n, Pr .. Pr + P - 1]`."""
    qzeros: Tensor
    """int32 `[G, N/P]`: zero points minus one, packed along N. A zero point of 0 wraps to the largest integer."""
    scales: Tensor
    """16-bit `[G, N]`."""
    g_idx: Tensor
    """int32 `[K]`: the group of every input channel."""


class AwqTensors(NamedTuple):
    """One 4-bit module as an `awq` (gemm) checkpoint stores it. Tensor names on disk are the field names."""

    qweight: Tensor
    """int32 `[K, N/8]`, packed along N in `AWQ_ORDER`."""
    qzeros: Tensor
    """int32 `[G, N/8]`: the zero points as they are, in the same order."""
    scales: Tensor
    """16-bit `[G, N]`."""


class CompressedTensors(NamedTuple):
    """One module as a `compressed-tensors` pack-quantized checkpoint stores it."""

    weight_packed: Tensor
    """int32 `[N, ceil(K/P)]`, P integers a word."""
    weight_scale: Tensor
    """16-bit `[N, G]`."""
    weight_shape: Tensor
    """int64 `[2]`: N and K."""
    weight_zero_point: Tensor | None
    """int32 `[ceil(N/P), G]`, packed along N; None for a symmetric grid, whose zero point is 2^(bits-1) everywhere."""


def per_word(bits: int) -> int:
    """Integers in an int32 word: 8 of 4 bits, 4 of 8.

    Raises:
        ValueError: a width that no format stores.
    """
    if bits not in WIDTHS:
        raise ValueError(f"{bits}-bit integers are stored by no format; allowed: 4, 8")
    return WORD_BITS // bits


def pack_integers(values: Tensor, *, bits: int, dim: int) -> Tensor:
    """Pack unsigned integers along `dim` into int32 words; an incomplete last word is filled with zeros.

    Args:
        values: any integer dtype, `[..., length, ...]`, every value in 0..2^bits - 1.
        bits: 4 or 8.
        dim: the dimension that is packed.

    Returns:
        int32, with `ceil(length / (32 / bits))` in place of `length`.

    Raises:
        ValueError: a value out of range, a floating-point tensor, or another width.
    """
    largest = 2**bits - 1
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"cannot pack {values.dtype}; integers in 0..{largest} are needed")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) > largest):
        raise ValueError(
            f"cannot pack values {int(values.min())}..{int(values.max())} in {bits} bits; allowed: 0..{largest}"
        )
    count = per_word(bits)
    wide = values.to(torch.int64).movedim(dim, -1)
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[-1] % count))
    wide = wide.reshape(*wide.shape[:-1], -1, count)
    words = (wide << _shifts(wide, bits)).sum(-1)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


def unpack_integers(words: Tensor, *, bits: int, dim: int, length: int) -> Tensor:
    """Undo `pack_integers`.

    Args:
        words: int32, packed along `dim`.
        bits: 4 or 8.
        dim: the dimension that was packed.
        length: how many integers there were along `dim`; the filling of the last word is dropped.

    Returns:
        uint8 in 0..2^bits - 1, with `length` along `dim`.

    Raises:
        ValueError: not int32, another width, or not exactly the words along `dim` that `length` integers need.
    """
    if words.dtype != torch.int32:
        raise ValueError(f"packed integers must be int32, got {words.dtype}")
    needed = -(-length // per_word(bits))
    if words.shape[dim] != needed:
        raise ValueError(f"{length} integers need {needed} words, got {words.shape[dim]}")
    wide = words.to(torch.int64).movedim(dim, -1).unsqueeze(-1)
    integers = (wide >> _shifts(wide, bits)) & (2**bits - 1)
    flat: Tensor = integers.reshape(*integers.shape[:-2], -1)[..., :length]
    return flat.to(torch.uint8).movedim(-1, dim).contiguous()


def pack_gptq(integers: Tensor, scales: Tensor, zeros: Tensor, *, bits: int = 4) -> GptqTensors:
    """Lay one module out as `gptq` version 1.

    Args:
        integers: uint8 `[N, K]` in 0..2^bits - 1; N and K multiples of 8, K a multiple of G.
        scales: 16-bit `[N, G]`.
        zeros: uint8 `[N, G]` in 0..2^bits - 1.
        bits: 4 or 8.

    Raises:
        ValueError: N or K does not fill words, or the shapes do not fit together.
    """
    N, K = integers.shape
    G = _groups(integers, scales, zeros)
    _fill_words("gptq", N, K, bits)
    return GptqTensors(
        qweight=pack_integers(integers.t(), bits=bits, dim=0),
        qzeros=pack_integers((zeros.t().to(torch.int64) - 1) % 2**bits, bits=bits, dim=1),
        scales=scales.t().contiguous(),
        g_idx=(torch.arange(K) // (K // G)).to(torch.int32),
    )


def unpack_gptq(tensors: GptqTensors, *, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_gptq`: integers uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`.

    Raises:
        ValueError: the shapes do not fit together, or `g_idx` permutes the groups (dynamic act-order).
    """
    K, N = tensors.qweight.shape[0] * per_word(bits), tensors.qweight.shape[1]
    G = tensors.scales.shape[0]
    if K % G or not torch.equal(tensors.g_idx.to(torch.int64), torch.arange(K) // (K // G)):
        raise ValueError(f"g_idx does not put {K} channels into {G} groups in order; act-order files are not supported")
    integers = unpack_integers(tensors.qweight, bits=bits, dim=0, length=K).t().contiguous()
    stored = unpack_integers(tensors.qzeros, bits=bits, dim=1, length=N).t()
    return integers, tensors.scales.t().contiguous(), ((stored.to(torch.int64) + 1) % 2**bits).to(torch.uint8)


def pack_awq(integers: Tensor, scales: Tensor, zeros: Tensor) -> AwqTensors:
    """Lay one 4-bit module out as `awq`, version gemm.

    Args:
        integers: uint8 `[N, K]` in 0..15; N and K multiples of 8 (readers repack along K), K a multiple of G.
        scales: 16-bit `[N, G]`.
        zeros: uint8 `[N, G]` in 0..15; stored for symmetric grids too.

    Raises:
        ValueError: N or K does not fill words, or the shapes do not fit together.
    """
    N, K = integers.shape
    _groups(integers, scales, zeros)
    _fill_words("awq", N, K, 4)
    return AwqTensors(
        qweight=pack_integers(_reordered(integers.t(), AWQ_ORDER), bits=4, dim=1),
        qzeros=pack_integers(_reordered(zeros.t(), AWQ_ORDER), bits=4, dim=1),
        scales=scales.t().contiguous(),
    )


def unpack_awq(tensors: AwqTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_awq`: integers uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`.

    Raises:
        ValueError: the shapes do not fit together.
    """
    N = tensors.scales.shape[1]
    back = sorted(range(len(AWQ_ORDER)), key=AWQ_ORDER.__getitem__)
    integers, zeros = (
        _reordered(unpack_integers(words, bits=4, dim=1, length=N), back).t().contiguous()
        for words in (tensors.qweight, tensors.qzeros)
    )
    scales = tensors.scales.t().contiguous()
    _groups(integers, scales, zeros)
    return integers, scales, zeros


def pack_compressed_tensors(
    integers: Tensor, scales: Tensor, zeros: Tensor, *, bits: int = 4, symmetric: bool = True
) -> CompressedTensors:
    """Lay one module out as `compressed-tensors` pack-quantized, which stores the signed integers plus 2^(bits-1).

    Args:
        integers: uint8 `[N, K]` in 0..2^bits - 1, K a multiple of G.
        scales: 16-bit `[N, G]`.
        zeros: uint8 `[N, G]`; all 2^(bits-1) if `symmetric`.
        bits: 4 or 8.
        symmetric: leave the zero points out of the file.

    Raises:
        ValueError: a symmetric grid with another zero point than 2^(bits-1), or the shapes do not fit together.
    """
    _groups(integers, scales, zeros)
    middle = 2 ** (bits - 1)
    if symmetric and not bool((zeros == middle).all()):
        raise ValueError(
            f"a symmetric {bits}-bit grid has zero point {middle} everywhere; pass symmetric=False to store others"
        )
    return CompressedTensors(
        weight_packed=pack_integers(integers, bits=bits, dim=1),
        weight_scale=scales.contiguous(),
        weight_shape=torch.tensor(integers.shape, dtype=torch.int64),
        weight_zero_point=None if symmetric else pack_integers(zeros, bits=bits, dim=0),
    )


def unpack_compressed_tensors(tensors: CompressedTensors, *, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_compressed_tensors`: integers uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`.

    Raises:
        ValueError: the packed tensors are not as long as `weight_shape` says.
    """
    N, K = (int(size) for size in tensors.weight_shape)
    integers = unpack_integers(tensors.weight_packed, bits=bits, dim=1, length=K)
    scales = tensors.weight_scale.contiguous()
    if tensors.weight_zero_point is None:
        return integers, scales, torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return integers, scales, unpack_integers(tensors.weight_zero_point, bits=bits, dim=0, length=N)


def _shifts(like: Tensor, bits: int) -> Tensor:
    return bits * torch.arange(per_word(bits), device=like.device)


def _reordered(values: Tensor, order: Sequence[int]) -> Tensor:
    """Each run of eight values of the last dimension in another order; `[R, N]`, N a multiple of 8."""
    R, N = values.shape
    return values.reshape(R, N // len(order), len(order))[:, :, list(order)].reshape(R, N)


def _fill_words(format_name: str, N: int, K: int, bits: int) -> None:
    count = per_word(bits)
    if N % count or K % count:
        raise ValueError(
            f"{format_name} packs {count} to a word along both dimensions: [{N}, {K}] must be multiples of {count}"
        )


def _groups(integers: Tensor, scales: Tensor, zeros: Tensor) -> int:
    N, K = integers.shape
    if scales.shape != zeros.shape or scales.dim() != 2 or scales.shape[0] != N:
        raise ValueError(f"scales {list(scales.shape)} and zeros {list(zeros.shape)} must both be [{N}, groups]")
    G = int(scales.shape[1])
    if G == 0 or K % G:
        raise ValueError(f"{G} groups do not divide {K} columns")
    return G
