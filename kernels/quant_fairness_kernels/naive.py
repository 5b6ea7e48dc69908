"""The truth that every kernel is compared with: dequantize, then multiply, in float64 or float32, as a formula reads.

Nothing here shares code with the kernels or with their layout; it starts from plain integers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_dequantize(
    integers: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    group_index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The weight `[N, K]` that 4-bit integers stand for: `(integer - zero) * scale` of the channel's group.

    Args:
        integers: `[N, K]` in 0..15.
        scales: `[N, G]`.
        zeros: `[N, G]` in 0..15.
        group_index: `[K]`, the group of every channel; None for groups of equal size in order.
        dtype: float64 or float32.
    """
    K, G = integers.shape[1], scales.shape[1]
    group = torch.arange(K, device=integers.device) // (K // G) if group_index is None else group_index.long()
    return (integers.to(dtype) - zeros.to(dtype)[:, group]) * scales.to(dtype)[:, group]


def naive_matmul(
    x: Tensor,
    weight: Tensor,
    *,
    columns: tuple[Tensor, Tensor] | None = None,
    dense: Tensor | None = None,
    bias: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """What `int4_matmul` computes, in the type of `weight`.

    Args:
        x: `[..., K]`.
        weight: `[N, K]` from `naive_dequantize`.
        columns: channels `[C]` and what they add, `[C, N]`: `x[..., index] @ added`.
        dense: 16-bit features `[D, K]` that follow the N.
        bias: `[N + D]`.
        silu_mul: even features are gates, odd ones their partners; returns `silu(gate) * up`.
    """
    x = x.to(weight.dtype)
    out = x @ weight.T
    if columns is not None:
        index, added = columns
        out = out + x[..., index.long()] @ added.to(weight.dtype)
    if dense is not None:
        out = torch.cat([out, x @ dense.to(weight.dtype).T], dim=-1)
    if bias is not None:
        out = out + bias.to(weight.dtype)
    if silu_mul:
        gate, up = out[..., 0::2], out[..., 1::2]
        out = gate * torch.sigmoid(gate) * up
    return out
