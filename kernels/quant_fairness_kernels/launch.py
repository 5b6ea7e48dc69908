"""Launches of the Triton kernels: pointers, strides and compile-time constants from a weight and a configuration.

Without a GPU the kernels run where `TRITON_INTERPRET=1` was set before triton was first imported. The interpreter runs
no inline PTX, and its bfloat16 arithmetic is wrong, so there the portable branch computes bfloat16 in float32.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_fairness_kernels.kernel_config import DEQUANTIZE_ABOVE, Gpu, KernelConfig, choose_config
from quant_fairness_kernels.nibble_planes import BLOCK, NibblePlanes

OLDEST_CAPABILITY = (8, 0)
"""bfloat16 tensor cores and asynchronous copies."""
INTERPRETED_GPU = Gpu("interpreter", (9, 0), 8)
"""What the interpreter's configurations are chosen for; small, so that it does not split K much."""


class Mixed(NamedTuple):
    """What a launch adds to the 4-bit body; None for what it does not add."""

    column_index: Tensor | None = None
    """int32 `[C]`."""
    column_weights: Tensor | None = None
    """16-bit `[C, N]`."""
    dense: Tensor | None = None
    """16-bit `[D, K]`."""
    bias: Tensor | None = None
    """16-bit `[N + D]`."""
    silu_mul: bool = False

    @property
    def D(self) -> int:  # noqa: N802
        """16-bit features."""
        return 0 if self.dense is None else int(self.dense.shape[0])


def interpreted() -> bool:
    """Whether triton interprets its kernels on the CPU; decided by the environment when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_for_triton(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on `device`, as a clause; None if they run."""
    if find_spec("triton") is None:
        return 'triton is not installed: pip install "quant-fairness[triton]"'
    if interpreted():
        return None
    if device.type != "cuda":
        return (
            f"they run on an NVIDIA GPU, and the tensors are on {device} (TRITON_INTERPRET=1 interprets them on a CPU)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}; 8.0 (A100) or newer is needed"
    return None


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind `device`; read once, because the properties never change."""
    if device.type != "cuda":
        return INTERPRETED_GPU
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def triton_matmul(x: Tensor, planes: NibblePlanes, mixed: Mixed, config: KernelConfig | None = None) -> Tensor:
    """`[M, N + D]` (half of that with `silu_mul`) in the type of `x`, by the kernel that M asks for.

    Args:
        x: `[M, K]`, M at least 1, the last dimension contiguous; checked by the caller.
        planes: the 4-bit weight.
        mixed: what is added to it.
        config: a configuration instead of the chosen one.
    """
    if config is None and x.shape[0] > DEQUANTIZE_ABOVE:
        return _through_dequantized(x, planes, mixed)
    if config is None:
        config = choose_config(
            gpu_of(x.device), M=x.shape[0], N=planes.N, K=planes.K, group=planes.kernel_group, D=mixed.D
        )
    return _fused(x, planes, mixed, config)


def triton_dequantize(planes: NibblePlanes) -> Tensor:
    """The 4-bit weight in 16 bit, `[K, N']`: channels in the order of the activations, features still padded."""
    from quant_fairness_kernels.triton_kernels.weights import dequantize_kernel

    width = planes.words.shape[1]
    # The interpreter has no right bfloat16: float32 out of it, rounded by torch.
    out = torch.empty(planes.K, width, dtype=_storage(planes.dtype), device=planes.words.device)
    permutation = planes.words if planes.permutation is None else planes.permutation
    dequantize_kernel[(-(-planes.K // BLOCK), width // 128)](
        planes.words,
        planes.scales,
        permutation,
        out,
        planes.K,
        planes.words.stride(0),
        planes.scales.stride(0),
        out.stride(0),
        GROUP=planes.kernel_group,
        SYMMETRIC=planes.symmetric,
        PERMUTED=planes.permutation is not None,
        BLOCK_N=128,
        **_arithmetic(planes.dtype),
        num_warps=4,
    )
    return out.to(planes.dtype)


def _fused(x: Tensor, planes: NibblePlanes, mixed: Mixed, config: KernelConfig) -> Tensor:
    from quant_fairness_kernels.triton_kernels.matmul import int4_matmul_kernel

    M, D = int(x.shape[0]), mixed.D
    tiles_m, tiles_n = config.tiles(M, planes.N, D)
    permuted = x if planes.permutation is None else x.index_select(1, planes.permutation)
    width = planes.N // 2 if mixed.silu_mul else planes.N + D
    out = torch.empty(M, width, dtype=_storage(x.dtype), device=x.device)
    # From the allocator's pool like any output: safe in CUDA graphs and between streams. Only counters must persist.
    partials = out
    if config.split_k > 1:
        elements = tiles_m * tiles_n * config.split_k * config.block_m * config.block_n
        partials = torch.empty(elements, dtype=torch.float32, device=x.device)
    columns = 0 if mixed.column_index is None else int(mixed.column_index.shape[0])
    int4_matmul_kernel[(tiles_m, tiles_n, config.split_k)](
        x,
        permuted,
        planes.words,
        planes.scales,
        _or(mixed.column_index, planes.counters),
        _or(mixed.column_weights, x),
        _or(mixed.dense, x),
        _or(mixed.bias, x),
        out,
        partials,
        planes.counters,
        M,
        planes.N,
        planes.K,
        columns,
        D,
        x.stride(0),
        permuted.stride(0),
        planes.words.stride(0),
        planes.scales.stride(0),
        _or(mixed.column_weights, x).stride(0),
        _or(mixed.dense, x).stride(0),
        out.stride(0),
        **kernel_constants(planes, mixed, config),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out.to(x.dtype)


def kernel_constants(planes: NibblePlanes, mixed: Mixed, config: KernelConfig) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "GROUP": planes.kernel_group,
        "SYMMETRIC": planes.symmetric,
        "EVEN_K": planes.K % BLOCK == 0,
        "HAS_COLUMNS": mixed.column_index is not None,
        "HAS_DENSE": mixed.dense is not None,
        "HAS_BIAS": mixed.bias is not None,
        "SILU_MUL": mixed.silu_mul,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLIT_K": config.split_k,
        "TRANSPOSED": config.transposed,
        "SCALE_AFTER": config.scale_after,
        "STAGES": config.stages,
        **_arithmetic(planes.dtype),
    }


def _through_dequantized(x: Tensor, planes: NibblePlanes, mixed: Mixed) -> Tensor:
    weight = triton_dequantize(planes)[:, : planes.N]
    if mixed.column_index is not None and mixed.column_weights is not None:
        index = mixed.column_index.long()
        weight.index_copy_(0, index, weight.index_select(0, index) + mixed.column_weights)
    out = x @ weight
    if mixed.dense is not None:
        out = torch.cat([out, torch.nn.functional.linear(x, mixed.dense)], dim=1)
    if mixed.bias is not None:
        out += mixed.bias
    if mixed.silu_mul:
        gate, up = out[:, 0::2].float(), out[:, 1::2].float()
        out = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return out


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """`tensor`, or any pointer where the kernel has been compiled not to read it."""
    return stand_in if tensor is None else tensor


def _storage(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The type of scales, the type of the products' operands, and whether inline PTX is used."""
    import triton.language as tl

    stored = tl.float16 if dtype == torch.float16 else tl.bfloat16
    return {"STORED": stored, "COMPUTE": tl.float32 if interpreted() else stored, "ASM": not interpreted()}
