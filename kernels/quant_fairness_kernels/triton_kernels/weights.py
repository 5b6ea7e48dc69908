"""The whole weight in 16 bit, for so many tokens that cuBLAS on it beats taking planes apart in every tile."""

from __future__ import annotations

import triton
import triton.language as tl

from quant_fairness_kernels.triton_kernels.dequantization import centred_planes
from quant_fairness_kernels.triton_kernels.tiles import BLOCK_K, PLANE, along_n, plane_rows, scale_of, zero_of


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    permutation_ptr,
    out_ptr,
    K,
    stride_words,
    stride_scales,
    stride_out,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One block of 128 input channels by BLOCK_N features, to the rows of `out` `[K, N']` of those channels."""
    GROUPS: tl.constexpr = 1 if GROUP == 0 else BLOCK_K // GROUP
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, PLANE)
    words = tl.load(words_ptr + (block * PLANE + r)[:, None] * stride_words + n[None, :])
    row = 0 if GROUP == 0 else block * GROUPS
    p0, p1, p2, p3 = plane_rows(scales_ptr + row * stride_scales + (n // 2 if SYMMETRIC else n), stride_scales, GROUP)
    w0, w1, w2, w3 = centred_planes(
        words,
        zero_of(p0, SYMMETRIC, False, STORED),
        zero_of(p1, SYMMETRIC, False, STORED),
        zero_of(p2, SYMMETRIC, False, STORED),
        zero_of(p3, SYMMETRIC, False, STORED),
        COMPUTE,
        ASM,
    )
    k = block * BLOCK_K + r
    store_plane(w0, p0, k, n, permutation_ptr, out_ptr, K, stride_out, SYMMETRIC, PERMUTED, STORED)
    store_plane(w1, p1, k + PLANE, n, permutation_ptr, out_ptr, K, stride_out, SYMMETRIC, PERMUTED, STORED)
    store_plane(w2, p2, k + 2 * PLANE, n, permutation_ptr, out_ptr, K, stride_out, SYMMETRIC, PERMUTED, STORED)
    store_plane(w3, p3, k + 3 * PLANE, n, permutation_ptr, out_ptr, K, stride_out, SYMMETRIC, PERMUTED, STORED)


@triton.jit
def store_plane(
    w,
    word,
    k,
    n,
    permutation_ptr,
    out_ptr,
    K,
    stride_out,
    SYMMETRIC: tl.constexpr,
    PERMUTED: tl.constexpr,
    STORED: tl.constexpr,
):
    """The plane times its scales, rounded once to the type of `out`, at the rows of its channels."""
    channel = k
    if PERMUTED:
        channel = tl.load(permutation_ptr + k, mask=k < K, other=0)
    scaled = w.to(tl.float32) * scale_of(word, n, SYMMETRIC, False, STORED).to(tl.float32)
    ptrs = out_ptr + channel.to(tl.int64)[:, None] * stride_out + along_n(n, False)
    tl.store(ptrs, scaled.to(out_ptr.dtype.element_ty), mask=(k < K)[:, None])
