"""Integer grids on tensors: fit scales and zero points, round to them, and read the weights back.

Step 6 (quantize). Takes weights `[rows, cols]` = `[output channels, input channels]`; returns a `QuantizedTensor`.
Integers are always chosen against the scale as it will be stored (16 bit), so what is measured is what is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.quantize.grid_rules import check_grid, group_count

SHRINK_STEPS = 80
"""Candidate ranges of the MSE search: 1.00, 0.99, … 0.21 of the largest magnitude."""


SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
"""float16 down to its subnormals, which real weights need; the others stop where float32 arithmetic may flush to 0."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight as integers on a grid; value = (integer - zero) * scale."""

    integers: Tensor
    """uint8 `[rows, cols]`, 0 … 2^bits - 1."""
    scales: Tensor
    """16-bit float (the dtype in which they are stored) `[rows, groups]`."""
    zeros: Tensor
    """uint8 `[rows, groups]`; 2^(bits-1) everywhere on a symmetric grid."""
    grid: Grid

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for, float32 `[rows, cols]`, computed from the stored scales."""
        rows, cols = self.integers.shape
        levels = self.integers.view(rows, self.scales.shape[1], -1).float()
        return ((levels - self.zeros.unsqueeze(2)) * self.scales.float().unsqueeze(2)).view(rows, cols)


def fit_grid(weight: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points for a weight.

    Symmetric: scale = 2 absmax / (2^bits - 1) and zero = 2^(bits-1), the convention of the GPTQ toolchains, where the
    range is not quite centred: absmax itself is clipped by half a step on the positive side.

    Args:
        weight: float `[rows, cols]`, not changed.
        grid: bits, group size, symmetry and clipping rule.
        scale_dtype: dtype in which scales will be stored.

    Returns:
        Scales `[rows, groups]` in `scale_dtype` and zeros `[rows, groups]` in uint8.

    Raises:
        ConfigError: the grid is not a grid, or its group does not divide the columns.
        ArtifactError: the weight holds NaN or infinity.
        UnsupportedModelError: a scale is too large for `scale_dtype`.
    """
    check_grid(grid)
    rows, cols = weight.shape
    grouped = weight.view(rows, group_count(grid, cols), -1)
    low, high = _ranges(grouped, symmetric=grid.symmetric)
    if not torch.isfinite(high - low).all():
        raise ArtifactError(
            "the weight holds NaN or infinity; only finite weights can be quantized. Check the model file"
        )
    scales, zeros = _grid_of_range(low, high, grid, scale_dtype)
    if not torch.isfinite(scales).all():
        largest = float(torch.maximum(high, -low).max())
        raise UnsupportedModelError(
            f"the scale of a weight of magnitude {largest:.3g} is too large for {scale_dtype}; "
            "load a bfloat16 checkpoint of the model"
        )
    return _shrunk(grouped, low, high, grid, (scales, zeros)) if grid.clip == "mse" else (scales, zeros)


def to_integers(weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> Tensor:
    """The nearest grid points, ties to even, as uint8 of the shape of `weight`.

    Args:
        weight: float, any shape that `scales` and `zeros` broadcast to.
        scales: 16-bit scales.
        zeros: zero points.
        bits: bits of the grid.
    """
    levels = torch.round(weight / scales.to(weight.dtype)) + zeros
    return levels.clamp_(0, 2**bits - 1).to(torch.uint8)


def quantize_rtn(weight: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Round a weight to the nearest grid points (no calibration).

    Args:
        weight: float `[rows, cols]`, not changed.
        grid: the grid.
        scale_dtype: dtype in which scales will be stored.

    Raises:
        ConfigError: the grid is not a grid, or its group does not divide the columns.
        ArtifactError: the weight holds NaN or infinity.
        UnsupportedModelError: a scale is too large for `scale_dtype`.
    """
    weight = weight.float().contiguous()
    scales, zeros = fit_grid(weight, grid, scale_dtype=scale_dtype)
    grouped = weight.view(*scales.shape, -1)
    integers = to_integers(grouped, scales.unsqueeze(2), zeros.unsqueeze(2), bits=grid.bits)
    return QuantizedTensor(integers=integers.view(weight.shape), scales=scales, zeros=zeros, grid=grid)


def _ranges(grouped: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, always with 0 between them (so that 0 stays exactly 0)."""
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def _grid_of_range(low: Tensor, high: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = 2**grid.bits - 1
    scales = ((high - low) / steps).to(scale_dtype)
    # A group of zeros, or of values below half of the smallest 16-bit number, would divide by zero.
    scales = scales.clamp(min=SMALLEST_SCALE[scale_dtype])
    if grid.symmetric:
        zeros = torch.full_like(low, 2 ** (grid.bits - 1))
    else:
        zeros = torch.round(-low / scales.to(low.dtype)).clamp(0, steps)
    return scales, zeros.to(torch.uint8)


def _shrunk(
    grouped: Tensor, low: Tensor, high: Tensor, grid: Grid, best: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The range, shrunk by the factor that gives the least squared error, for each group on its own."""
    scales, zeros = best
    least = _squared_error(grouped, scales, zeros, grid.bits)
    for step in range(1, SHRINK_STEPS):
        keep = 1 - step / 100
        new_scales, new_zeros = _grid_of_range(low * keep, high * keep, grid, scales.dtype)
        error = _squared_error(grouped, new_scales, new_zeros, grid.bits)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, new_scales, scales), torch.where(better, new_zeros, zeros)
    return scales, zeros


def _squared_error(grouped: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    scale = scales.to(grouped.dtype).unsqueeze(2)
    zero = zeros.unsqueeze(2)
    levels = torch.round(grouped / scale).add_(zero).clamp_(0, 2**bits - 1)
    return levels.sub_(zero).mul_(scale).sub_(grouped).square_().sum(2)
