"""The CPU path: torch's 4-bit operator for few tokens in bfloat16, a cached 16-bit weight for more.

The operator takes each weight apart again for every pair of tokens, so it wins while memory binds and loses as tokens
are added. Where it stops winning depends on the shape; `configs/cpu.json` holds what was measured, with the machine.
Memory: 0.5 byte per weight for the operator, 2 for the cached weight, so 2.5 against the 2 of plain bfloat16: this
path is for speed, and for the same results as elsewhere, not for memory. `keep_dense=False` keeps 0.5 and dequantizes
on every call above the threshold, which is slow.

With float32 and float16 activations torch's operator falls into a scalar loop, so these use the cached weight alone;
float32 is the type of exact tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from quant_fairness_kernels.dequantize import dequantize_planes
from quant_fairness_kernels.int4_matmul import Columns
from quant_fairness_kernels.nibble_planes import NibblePlanes, plane_integers, plane_scales

OPERATOR_GROUPS = (128, 64, 32)
"""Group sizes of torch's operator that a stored group can be expressed in; it refuses less than 32."""
OPERATOR_FEATURES = 16
"""Features come in multiples of this; the rest is padded."""
OPERATOR_ZERO = 8
"""The operator computes `(integer - 8) * scale + offset`."""


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """One weight, prepared for a CPU. Everything but the operator's tensors is folded into `dense`."""

    N: int
    K: int
    dtype: torch.dtype
    rows: int
    """Most tokens that go through the operator; 0 for none."""
    packed: Tensor | None
    """uint8, torch's own layout."""
    scales_and_offsets: Tensor | None
    """bfloat16 `[K / group, N, 2]`, N padded."""
    permutation: Tensor | None
    columns: Columns | None
    extra: Tensor | None
    """16-bit features `[D, K]` that follow the 4-bit ones."""
    dense: Tensor | None
    """`[N + D, K]` in `dtype`, channels in the order of the activations; None where it is made on every call."""
    planes: NibblePlanes | None
    """What `dense` is made from where it is not kept."""


def prepare_cpu(
    planes: NibblePlanes,
    *,
    dtype: torch.dtype = torch.bfloat16,
    columns: Columns | None = None,
    dense: Tensor | None = None,
    keep_dense: bool = True,
    rows: int | None = None,
) -> CpuWeight:
    """Bring one weight into the form that `cpu_matmul` takes; `planes` is not changed.

    Args:
        planes: the 4-bit body, on the CPU.
        dtype: type of the activations: bfloat16, float16 or float32.
        columns: as of `int4_matmul`.
        dense: as of `int4_matmul`.
        keep_dense: keep the dequantized weight (2 bytes per weight in 16 bit, 4 in float32).
        rows: most tokens for torch's operator; None takes the measured threshold for this shape and CPU.

    Raises:
        ValueError: another type, a weight that is not on the CPU, or columns or dense features that do not fit it.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"activations in {dtype} are not supported; allowed: bfloat16, float16, float32")
    if planes.words.device.type != "cpu":
        raise ValueError(f"the weight is on {planes.words.device}; move it to the CPU first")
    if columns is not None:
        columns = columns.checked(N=planes.N, K=planes.K)
    if dense is not None and (dense.dim() != 2 or dense.shape[1] != planes.K):
        raise ValueError(f"dense is {list(dense.shape)}; it must be [D, {planes.K}]")
    group = _operator_group(planes)
    if dtype != torch.bfloat16 or group is None:
        rows = 0
    elif rows is None:
        rows = measured_rows(planes.N, planes.K)
    packed, scales = (None, None) if not rows or group is None else _operator_tensors(planes, group)
    whole = _dense(planes, dtype, columns, dense) if keep_dense else None
    return CpuWeight(
        N=planes.N,
        K=planes.K,
        dtype=dtype,
        rows=rows,
        packed=packed,
        scales_and_offsets=scales,
        permutation=planes.permutation,
        columns=columns,
        extra=dense,
        dense=whole,
        planes=None if keep_dense else planes,
    )


def cpu_matmul(x: Tensor, weight: CpuWeight, *, bias: Tensor | None = None, silu_mul: bool = False) -> Tensor:
    """`x @ W^T` on a CPU, `[..., N + D]` in the type of `x`.

    Up to `weight.rows` tokens torch's 4-bit operator: its error is that of bfloat16 (offsets of zero points are rounded
    to it). Above, `linear` with the dequantized weight.

    Raises:
        ValueError: `x` has another type, device or last dimension than the weight was prepared for, or the bias another
            length than the result, or `silu_mul` an odd number of features.
    """
    if x.dtype != weight.dtype or x.device.type != "cpu" or x.shape[-1:] != (weight.K,):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}; "
            f"this weight takes {weight.dtype} [..., {weight.K}] on the CPU"
        )
    features = weight.N + (0 if weight.extra is None else len(weight.extra))
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias is {list(bias.shape)}; it must be [{features}]")
    if silu_mul and features % 2:
        raise ValueError(f"silu_mul needs an even number of features, gates and their partners; this has {features}")
    rows = x.reshape(-1, weight.K)
    if 0 < rows.shape[0] <= weight.rows:
        out = _by_operator(rows, weight)
    else:
        dense = weight.dense
        if dense is None:
            assert weight.planes is not None  # prepare_cpu keeps the one or the other
            dense = _dense(weight.planes, weight.dtype, weight.columns, weight.extra)
        out = linear(rows, dense)
    if bias is not None:
        out = out + bias
    if silu_mul:
        out = silu(out[:, 0::2]) * out[:, 1::2]
    return out.view(*x.shape[:-1], out.shape[-1])


def measured_rows(N: int, K: int) -> int:
    """Most tokens for which the operator was measured to beat bfloat16, on the largest measured shape within this one.

    0 where nothing was measured: smaller shapes, or another instruction set than the measured one.
    """
    measured = measured_table()
    if measured.capability != torch.backends.cpu.get_cpu_capability():
        return 0
    within = [shape for shape in measured.rows if shape[0] * shape[1] <= N * K]
    return measured.rows[max(within, key=lambda shape: shape[0] * shape[1])] if within else 0


class MeasuredTable(NamedTuple):
    """`configs/cpu.json`."""

    capability: str
    """The instruction set that torch used."""
    rows: dict[tuple[int, int], int]
    """By N and K, the most tokens for which the operator was faster."""


@cache
def measured_table() -> MeasuredTable:
    """The shipped thresholds, written by `benchmarks/kernels/cpu.py`."""
    document = json.loads((files("quant_fairness_kernels") / "configs" / "cpu.json").read_text(encoding="utf-8"))
    rows = {(entry["N"], entry["K"]): entry["rows"] for entry in document["entries"]}
    return MeasuredTable(document["capability"], rows)


def _by_operator(x: Tensor, weight: CpuWeight) -> Tensor:
    assert weight.packed is not None  # rows > 0 only where prepare_cpu made them
    assert weight.scales_and_offsets is not None
    group = weight.K // weight.scales_and_offsets.shape[0]
    body = x if weight.permutation is None else x[:, weight.permutation]
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        body.contiguous(), weight.packed, group, weight.scales_and_offsets
    )
    out = out[:, : weight.N]
    if weight.columns is not None:
        out = out + x[:, weight.columns.index.long()] @ weight.columns.weights.to(x.dtype)
    if weight.extra is not None:
        out = torch.cat([out, linear(x, weight.extra.to(x.dtype))], dim=1)
    return out


def _operator_group(planes: NibblePlanes) -> int | None:
    """The largest group size of the operator in which every group of the weight is whole; None if there is none."""
    size = planes.kernel_group or planes.K
    return next((group for group in OPERATOR_GROUPS if size % group == 0), None)


def _operator_tensors(planes: NibblePlanes, group: int) -> tuple[Tensor, Tensor]:
    scales, zeros = (tensor.to(torch.float32) for tensor in plane_scales(planes))
    repeats = (planes.kernel_group or planes.K) // group
    both = torch.stack([scales, (OPERATOR_ZERO - zeros) * scales], dim=-1)
    both = both.repeat_interleave(repeats, dim=1).transpose(0, 1)
    missing = -planes.N % OPERATOR_FEATURES
    integers = pad(plane_integers(planes).to(torch.int32), (0, 0, 0, missing))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    return packed, pad(both, (0, 0, 0, missing)).to(torch.bfloat16).contiguous()


def _dense(planes: NibblePlanes, dtype: torch.dtype, columns: Columns | None, extra: Tensor | None) -> Tensor:
    weight = dequantize_planes(planes)
    if columns is not None:
        weight.index_add_(1, columns.index.long(), columns.weights.to(weight.dtype).T)
    whole = weight.to(dtype)
    return whole if extra is None else torch.cat([whole, extra.to(dtype)])
