"""The INT4 matmul kernel: `out = x @ W^T`, W mostly 4 bit, one launch whatever is mixed into it.

One program computes one tile of the output, `BLOCK_M` tokens by `BLOCK_N` features, over every `SPLIT_K`-th block of
128 input channels, in float32 accumulators. Per block it loads one tile of words (16 bytes per thread, asynchronous),
one 32-bit word of scale and zero point per group and feature, takes the four planes apart (`centred_planes`), and
multiplies each with its 32 input channels on the tensor cores.

* `TRANSPOSED` computes `W x^T` instead of `x W^T`. The tile of W is then the left operand, which Hopper's tensor cores
  read from registers, so that dequantized weights never go through shared memory. Both read the same words.
* `SCALE_AFTER` multiplies each group's float32 partial product by its scale: exact, and cheap while `BLOCK_M` is
  small. Otherwise the weights are scaled, rounded to 16 bit, before they are multiplied.
* `SPLIT_K > 1` writes float32 partial tiles to a workspace; the program that comes last to a tile, found by counting,
  adds them in the order of their index and sets the counter back to zero. So results do not depend on which
  program is last, the counters need no clearing between launches, and nothing is synchronised with the host.

A scale and a zero point share one 32-bit word (two scales where the grid is symmetric) because 4 bytes are the least
that the asynchronous copy takes: a 16-bit load would be waited for in every block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_fairness_kernels.triton_kernels.tiles import add_columns, along_m, along_n, dense_tile, int4_tile


@triton.jit
def int4_matmul_kernel(
    x_ptr,
    permuted_x_ptr,
    words_ptr,
    scales_ptr,
    column_index_ptr,
    column_weights_ptr,
    dense_ptr,
    bias_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    C,
    D,
    stride_x,
    stride_permuted,
    stride_words,
    stride_scales,
    stride_columns,
    stride_dense,
    stride_out,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One output tile; `GROUP` is 128, 64, 32, or 0 for one scale per feature. See the module for the rest."""
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    split = tl.program_id(2)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    int4_tiles = tl.cdiv(N, BLOCK_N)
    is_dense = tile_n >= int4_tiles if HAS_DENSE else False
    if is_dense:
        n -= int4_tiles * BLOCK_N
        acc = dense_tile(x_ptr, dense_ptr, m, n, split, M, D, K, stride_x, stride_dense, SPLIT_K, TRANSPOSED, COMPUTE)
    else:
        acc = int4_tile(
            permuted_x_ptr,
            words_ptr,
            scales_ptr,
            m,
            n,
            split,
            M,
            K,
            stride_permuted,
            stride_words,
            stride_scales,
            GROUP,
            SYMMETRIC,
            EVEN_K,
            SPLIT_K,
            TRANSPOSED,
            SCALE_AFTER,
            STORED,
            COMPUTE,
            ASM,
            STAGES,
        )
        if HAS_COLUMNS:
            acc = add_columns(
                acc,
                x_ptr,
                column_index_ptr,
                column_weights_ptr,
                m,
                n,
                split,
                M,
                N,
                C,
                stride_x,
                stride_columns,
                SPLIT_K,
                TRANSPOSED,
                COMPUTE,
            )
    first = tl.where(is_dense, N, 0) if HAS_DENSE else 0
    limit = tl.where(is_dense, D, N) if HAS_DENSE else N
    if SPLIT_K == 1:
        store_tile(acc, out_ptr, bias_ptr, m, n, M, limit, first, stride_out, HAS_BIAS, SILU_MUL, TRANSPOSED)
    else:
        tile = tile_n * tl.num_programs(0) + tile_m
        inner = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        partials = partials_ptr + tile * (SPLIT_K * BLOCK_M * BLOCK_N) + inner
        tl.store(partials + split * (BLOCK_M * BLOCK_N), acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            total = tl.zeros_like(acc)
            for part in range(SPLIT_K):
                total += tl.load(partials + part * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
            store_tile(total, out_ptr, bias_ptr, m, n, M, limit, first, stride_out, HAS_BIAS, SILU_MUL, TRANSPOSED)
            tl.store(counters_ptr + tile, 0)


@triton.jit
def store_tile(
    acc,
    out_ptr,
    bias_ptr,
    m,
    n,
    M,
    limit,
    first,
    stride_out,
    HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Bias, activation, rounding to the output's type, and the store of the features below `limit`."""
    if HAS_BIAS:
        acc += along_n(tl.load(bias_ptr + first + n, mask=n < limit, other=0.0).to(tl.float32), TRANSPOSED)
    if SILU_MUL:
        pairs = tl.trans(acc) if TRANSPOSED else acc
        gate, up = tl.split(tl.reshape(pairs, (m.shape[0], n.shape[0] // 2, 2)))
        half = tl.min(n, 0) // 2 + tl.arange(0, n.shape[0] // 2)
        out = gate / (1.0 + tl.exp(-gate)) * up
        ptrs = out_ptr + m[:, None] * stride_out + half[None, :]
        tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (half[None, :] < limit // 2))
    else:
        ptrs = out_ptr + along_m(m, TRANSPOSED) * stride_out + along_n(first + n, TRANSPOSED)
        inside = (along_m(m, TRANSPOSED) < M) & (along_n(n, TRANSPOSED) < limit)
        tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
