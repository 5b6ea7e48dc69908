"""`int4_matmul`: activations times a 4-bit weight, on a GPU by the Triton kernels, elsewhere by torch.

The checks and the choice are here; `launch` launches. The operator underneath, `quant_fairness::int4_matmul`, has a
shape function for tracing, so `torch.compile(fullgraph=True)` and `torch.export` take it as one node. There is no
gradient. After one call per range of M (triton compiles then), calls may be captured in a CUDA graph: they neither wait
for the GPU nor time anything, and the only state, the weight's counters, is zero before and after every launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant_fairness_kernels.dequantize import dequantize_planes
from quant_fairness_kernels.launch import Mixed, missing_for_triton, triton_matmul
from quant_fairness_kernels.nibble_planes import NibblePlanes

Kernel = Literal["auto", "triton", "reference"]
KERNELS: tuple[Kernel, ...] = ("auto", "triton", "reference")
MOST_ELEMENTS = 2**31 - 1
"""The kernels index with 32 bits."""


@dataclass(frozen=True, slots=True)
class Columns:
    """16-bit input channels beside the 4-bit body: the result gains `x[..., index] @ weights`.

    Where the body is cleared there (`clear_channels`), `weights` are the channels' own; where it is not, the difference
    to them.
    """

    index: Tensor
    """int32 `[C]`: input channels, each at most once."""
    weights: Tensor
    """16-bit `[C, N]`."""

    def checked(self, *, N: int, K: int) -> Columns:
        """Itself, after looking at the channels once: a launch does not, which would make it wait for the GPU.

        Raises:
            ValueError: a shape or type that `int4_matmul` would not take, or a channel outside 0..K - 1 or named twice.
        """
        index = self.index
        if index.dtype != torch.int32 or index.dim() != 1 or self.weights.shape != (len(index), N):
            raise ValueError(
                f"columns are {index.dtype} {list(index.shape)} with weights {list(self.weights.shape)}; they must be "
                f"torch.int32 [C] and [C, {N}]"
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < K:
            raise ValueError(f"columns name channels {int(index.min())}..{int(index.max())}; accepted are 0..{K - 1}")
        repeated = len(index) - int(index.bincount().count_nonzero()) if len(index) else 0
        if repeated:
            raise ValueError(f"columns name {repeated} channels more than once")
        return self


def int4_matmul(
    x: Tensor,
    weight: NibblePlanes,
    *,
    columns: Columns | None = None,
    dense: Tensor | None = None,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    kernel: Kernel = "auto",
) -> Tensor:
    """`x @ W^T`, W mostly 4 bit, in one launch; deterministic, whatever the split of K.

    Args:
        x: `[..., K]` in the type of `weight`, last dimension contiguous; may have no rows.
        weight: the 4-bit body, `[N, K]`.
        columns: input channels that are kept in 16 bit.
        dense: output features that are kept in 16 bit, `[D, K]`; they follow the N.
        bias: `[N + D]`.
        silu_mul: return `silu(even features) * odd features`, `[..., N / 2]` (see `interleave_planes`).
        kernel: `auto` is the Triton kernels for tensors on a GPU and the reference elsewhere; `reference` dequantizes
            to float32 on every call: exact, and slow (`cpu_matmul` is the fast way on a CPU).

    Returns:
        `[..., N + D]` in the type of `x`, accumulated in float32 and rounded once.

    Raises:
        ValueError: sizes, types, devices or strides that do not fit, or more than 2^31 - 1 elements.
        RuntimeError: the Triton kernels cannot run here; the message says what is missing.
    """
    _check(x, weight, columns, dense, bias, silu_mul)
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; accepted are {', '.join(KERNELS)}")
    if kernel == "auto":
        kernel = "triton" if x.is_cuda else "reference"
    if kernel == "triton" and (missing := missing_for_triton(x.device)) is not None:
        raise RuntimeError(f"the Triton kernels cannot run: {missing}; or ask for kernel='reference'")
    rows = x.reshape(-1, weight.K)
    out: Tensor = _int4_matmul(
        rows,
        weight.words,
        weight.scales,
        weight.counters,
        weight.permutation,
        None if columns is None else columns.index,
        None if columns is None else columns.weights,
        dense,
        bias,
        [weight.N, weight.K, weight.groups],
        weight.symmetric,
        silu_mul,
        kernel == "triton",
    )
    return out.view(*x.shape[:-1], out.shape[-1])


@torch.library.custom_op("quant_fairness::int4_matmul", mutates_args=())
def _int4_matmul(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    counters: Tensor,
    permutation: Tensor | None,
    column_index: Tensor | None,
    column_weights: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    symmetric: bool,
    silu_mul: bool,
    use_triton: bool,
) -> Tensor:
    """`int4_matmul` on plain tensors; `sizes` are N, K and the groups. The counters are zero again on return."""
    N, K, groups = sizes
    planes = NibblePlanes(words, scales, permutation, counters, N, K, groups, symmetric, x.dtype)
    mixed = Mixed(column_index, column_weights, dense, bias, silu_mul)
    if x.shape[0] == 0:
        features = N + mixed.D
        return x.new_empty(0, features // 2 if silu_mul else features)
    return triton_matmul(x, planes, mixed) if use_triton else reference_matmul(x, planes, mixed)


@_int4_matmul.register_fake
def _shape_of(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    counters: Tensor,
    permutation: Tensor | None,
    column_index: Tensor | None,
    column_weights: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    symmetric: bool,
    silu_mul: bool,
    use_triton: bool,
) -> Tensor:
    features = sizes[0] + (0 if dense is None else dense.shape[0])
    return x.new_empty(x.shape[0], features // 2 if silu_mul else features)


def reference_matmul(x: Tensor, planes: NibblePlanes, mixed: Mixed) -> Tensor:
    """What the kernels compute, in float32 by torch, rounded once to the type of `x`; on any device."""
    wide = x.float()
    out = wide @ dequantize_planes(planes).T
    if mixed.column_index is not None and mixed.column_weights is not None:
        out += wide[:, mixed.column_index.long()] @ mixed.column_weights.float()
    if mixed.dense is not None:
        out = torch.cat([out, wide @ mixed.dense.float().T], dim=1)
    if mixed.bias is not None:
        out += mixed.bias.float()
    if mixed.silu_mul:
        out = torch.nn.functional.silu(out[:, 0::2]) * out[:, 1::2]
    return out.to(x.dtype)


def _check(
    x: Tensor, weight: NibblePlanes, columns: Columns | None, dense: Tensor | None, bias: Tensor | None, silu_mul: bool
) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.K:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must be K = {weight.K}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x has stride {x.stride(-1)} along K; call .contiguous() first")
    if silu_mul and (dense is not None or weight.N % 2):
        raise ValueError(f"silu_mul needs an even number of 4-bit features and no dense ones; N = {weight.N}")
    D = 0 if dense is None else dense.shape[0]
    index, added = (None, None) if columns is None else (columns.index, columns.weights)
    C = 0 if index is None else index.shape[0]
    _check_one("dense", dense, x, (D, weight.K), weight.dtype)
    _check_one("bias", bias, x, (weight.N + D,), weight.dtype)
    _check_one("columns.index", index, x, (C,), torch.int32)
    _check_one("columns.weights", added, x, (C, weight.N), weight.dtype)
    _check_one("x", x, x, tuple(x.shape), weight.dtype, contiguous=False)
    _check_one("weight", weight.words, x, tuple(weight.words.shape), torch.int16)
    _check_elements(x, x.numel() // max(1, weight.K) * (weight.N + D), weight)


def _check_one(
    name: str, tensor: Tensor | None, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, contiguous: bool = True
) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; this weight takes {dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {list(tensor.stride())}); call .contiguous() first")


def _check_elements(x: Tensor, outputs: int, weight: NibblePlanes) -> None:
    last = x.numel() if x.is_contiguous() else sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    for name, elements in (("x", last), ("the result", outputs), ("the weight", weight.words.numel())):
        if elements > MOST_ELEMENTS:
            raise ValueError(f"{name} has {elements} elements; the kernels index up to {MOST_ELEMENTS}: split the call")
