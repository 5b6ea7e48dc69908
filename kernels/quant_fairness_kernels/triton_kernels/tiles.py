"""The parts of an output tile: its 4-bit body, its 16-bit input channels, and tiles of 16-bit output features.

Each returns a float32 tile `[tokens, features]`, or `[features, tokens]` if TRANSPOSED; `along_m` and `along_n` give a
vector the shape that it has in the orientation at hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_fairness_kernels.triton_kernels.dequantization import centred_planes

BLOCK_K = tl.constexpr(128)
PLANE = tl.constexpr(32)
COLUMN_CHUNK = tl.constexpr(32)
DENSE_CHUNK = tl.constexpr(64)


@triton.jit
def int4_tile(
    x_ptr,
    words_ptr,
    scales_ptr,
    m,
    n,
    split,
    M,
    K,
    stride_x,
    stride_words,
    stride_scales,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The 4-bit part of a tile, this split's blocks only: float32, `[m, n]`, or `[n, m]` if TRANSPOSED."""
    GROUPS: tl.constexpr = 1 if GROUP == 0 else BLOCK_K // GROUP
    k = tl.arange(0, PLANE)
    inside = along_m(m, TRANSPOSED) < M
    x_ptrs = x_ptr + along_m(m, TRANSPOSED) * stride_x + along_n(k, TRANSPOSED)
    word_ptrs = words_ptr + along_m(k, TRANSPOSED) * stride_words + along_n(n, TRANSPOSED)
    scale_ptrs = scales_ptr + (n // 2 if SYMMETRIC else n)
    acc = tl.zeros((n.shape[0], m.shape[0]) if TRANSPOSED else (m.shape[0], n.shape[0]), tl.float32)
    for block in tl.range(split, tl.cdiv(K, BLOCK_K), SPLIT_K, num_stages=STAGES):
        words = tl.load(word_ptrs + block * PLANE * stride_words)
        p0, p1, p2, p3 = plane_rows(
            scale_ptrs + (0 if GROUP == 0 else block * GROUPS * stride_scales), stride_scales, GROUP
        )
        k0 = block * BLOCK_K + along_n(k, TRANSPOSED)
        x0 = load_x(x_ptrs + block * BLOCK_K, inside, k0, K, EVEN_K, COMPUTE)
        x1 = load_x(x_ptrs + block * BLOCK_K + PLANE, inside, k0 + PLANE, K, EVEN_K, COMPUTE)
        x2 = load_x(x_ptrs + block * BLOCK_K + 2 * PLANE, inside, k0 + 2 * PLANE, K, EVEN_K, COMPUTE)
        x3 = load_x(x_ptrs + block * BLOCK_K + 3 * PLANE, inside, k0 + 3 * PLANE, K, EVEN_K, COMPUTE)
        w0, w1, w2, w3 = centred_planes(
            words,
            zero_of(p0, SYMMETRIC, TRANSPOSED, STORED),
            zero_of(p1, SYMMETRIC, TRANSPOSED, STORED),
            zero_of(p2, SYMMETRIC, TRANSPOSED, STORED),
            zero_of(p3, SYMMETRIC, TRANSPOSED, STORED),
            COMPUTE,
            ASM,
        )
        if GROUP == 0:
            acc = multiply(x0, w0, acc, TRANSPOSED)
            acc = multiply(x1, w1, acc, TRANSPOSED)
            acc = multiply(x2, w2, acc, TRANSPOSED)
            acc = multiply(x3, w3, acc, TRANSPOSED)
        else:
            s0 = scale_of(p0, n, SYMMETRIC, TRANSPOSED, STORED)
            s1 = scale_of(p1, n, SYMMETRIC, TRANSPOSED, STORED)
            s2 = scale_of(p2, n, SYMMETRIC, TRANSPOSED, STORED)
            s3 = scale_of(p3, n, SYMMETRIC, TRANSPOSED, STORED)
            if not SCALE_AFTER:
                acc = multiply(x0, w0 * s0.to(COMPUTE), acc, TRANSPOSED)
                acc = multiply(x1, w1 * s1.to(COMPUTE), acc, TRANSPOSED)
                acc = multiply(x2, w2 * s2.to(COMPUTE), acc, TRANSPOSED)
                acc = multiply(x3, w3 * s3.to(COMPUTE), acc, TRANSPOSED)
            else:
                part = multiply(x0, w0, tl.zeros_like(acc), TRANSPOSED)
                if GROUP == 32:
                    acc += part * s0.to(tl.float32)
                    part = tl.zeros_like(acc)
                part = multiply(x1, w1, part, TRANSPOSED)
                if GROUP != 128:
                    acc += part * s1.to(tl.float32)
                    part = tl.zeros_like(acc)
                part = multiply(x2, w2, part, TRANSPOSED)
                if GROUP == 32:
                    acc += part * s2.to(tl.float32)
                    part = tl.zeros_like(acc)
                part = multiply(x3, w3, part, TRANSPOSED)
                acc += part * s3.to(tl.float32)
    if GROUP == 0:
        acc *= scale_of(tl.load(scale_ptrs), n, SYMMETRIC, TRANSPOSED, STORED).to(tl.float32)
    return acc


@triton.jit
def add_columns(
    acc,
    x_ptr,
    index_ptr,
    weights_ptr,
    m,
    n,
    split,
    M,
    N,
    C,
    stride_x,
    stride_columns,
    SPLIT_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`acc` plus `x[:, index] @ weights`, this split's chunks only: the input channels that are kept in 16 bit."""
    c = tl.arange(0, COLUMN_CHUNK)
    for start in range(split * COLUMN_CHUNK, C, COLUMN_CHUNK * SPLIT_K):
        chosen = start + c < C
        channel = tl.load(index_ptr + start + c, mask=chosen, other=0)
        x = tl.load(
            x_ptr + along_m(m, TRANSPOSED) * stride_x + along_n(channel, TRANSPOSED),
            mask=(along_m(m, TRANSPOSED) < M) & along_n(chosen, TRANSPOSED),
            other=0.0,
        ).to(COMPUTE)
        w = tl.load(
            weights_ptr + along_m(start + c, TRANSPOSED) * stride_columns + along_n(n, TRANSPOSED),
            mask=along_m(chosen, TRANSPOSED) & (along_n(n, TRANSPOSED) < N),
            other=0.0,
        ).to(COMPUTE)
        acc = multiply(x, w, acc, TRANSPOSED)
    return acc


@triton.jit
def dense_tile(
    x_ptr,
    dense_ptr,
    m,
    n,
    split,
    M,
    D,
    K,
    stride_x,
    stride_dense,
    SPLIT_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The 16-bit output features' part of a tile: `x @ dense^T`, this split's chunks only, shaped as `int4_tile`."""
    k = tl.arange(0, DENSE_CHUNK)
    acc = tl.zeros((n.shape[0], m.shape[0]) if TRANSPOSED else (m.shape[0], n.shape[0]), tl.float32)
    for start in range(split * DENSE_CHUNK, K, DENSE_CHUNK * SPLIT_K):
        x = tl.load(
            x_ptr + along_m(m, TRANSPOSED) * stride_x + along_n(start + k, TRANSPOSED),
            mask=(along_m(m, TRANSPOSED) < M) & (along_n(start + k, TRANSPOSED) < K),
            other=0.0,
        ).to(COMPUTE)
        w = tl.load(
            dense_ptr + along_n(n, TRANSPOSED) * stride_dense + along_m(start + k, TRANSPOSED),
            mask=(along_n(n, TRANSPOSED) < D) & (along_m(start + k, TRANSPOSED) < K),
            other=0.0,
        ).to(COMPUTE)
        acc = multiply(x, w, acc, TRANSPOSED)
    return acc


@triton.jit
def multiply(x, w, acc, TRANSPOSED: tl.constexpr):
    """`acc + x w`, or with both operands transposed `acc + w x`."""
    return tl.dot(w, x, acc) if TRANSPOSED else tl.dot(x, w, acc)


@triton.jit
def load_x(ptrs, inside, k, K, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr):
    """A tile of activations; tokens and channels that do not exist are zero."""
    return tl.load(ptrs, mask=inside if EVEN_K else inside & (k < K), other=0.0).to(COMPUTE)


@triton.jit
def plane_rows(ptrs, stride, GROUP: tl.constexpr):
    """The row of scale words that belongs to each of the four planes of a block; equal rows are loaded once."""
    p0 = tl.load(ptrs)
    p1 = p0
    p2 = p0
    p3 = p0
    if GROUP == 64:
        p2 = tl.load(ptrs + stride)
        p3 = p2
    elif GROUP == 32:
        p1 = tl.load(ptrs + stride)
        p2 = tl.load(ptrs + 2 * stride)
        p3 = tl.load(ptrs + 3 * stride)
    return p0, p1, p2, p3


@triton.jit
def scale_of(word, n, SYMMETRIC: tl.constexpr, TRANSPOSED: tl.constexpr, STORED: tl.constexpr):
    """The scales in the low halves of the words; of a symmetric grid, odd features have theirs in the high half."""
    bits = along_n(word, TRANSPOSED)
    if SYMMETRIC:
        bits = bits >> along_n((n % 2) * 16, TRANSPOSED)
    return bits.to(tl.int16).to(STORED, bitcast=True)


@triton.jit
def zero_of(word, SYMMETRIC: tl.constexpr, TRANSPOSED: tl.constexpr, STORED: tl.constexpr):
    """The zero points in the high halves of the words, or the constant 8 of a symmetric grid."""
    if SYMMETRIC:
        zero = tl.full((1, 1), 8.0, STORED)
    else:
        zero = along_n((word >> 16).to(tl.int16), TRANSPOSED).to(STORED, bitcast=True)
    return zero


@triton.jit
def along_m(values, TRANSPOSED: tl.constexpr):
    """`values` along the first dimension, where x has its tokens; along the second if TRANSPOSED."""
    return values[None, :] if TRANSPOSED else values[:, None]


@triton.jit
def along_n(values, TRANSPOSED: tl.constexpr):
    """`values` along the second dimension, where the words have their features; along the first if TRANSPOSED."""
    return values[:, None] if TRANSPOSED else values[None, :]
