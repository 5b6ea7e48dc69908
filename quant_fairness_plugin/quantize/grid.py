"""Integer grids on tensors: fit scales and zero points, round to them, and read the weights back.

Takes weights `[rows, cols]` = `[output channels, input channels]`; returns a `QuantizedTensor`.
Integers are always rounded against the scale as it will be stored (16 bit), so what is measured is what is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.quantize.clipping.exact import clip_exactly
from quant_fairness_plugin.quantize.clipping.rules import (
    DEAR_STRIDE,
    SMALLEST_SCALE,
    Fit,
    Groups,
    clip_analytically,
    fit_range,
    group_ranges,
    rounding_error,
    shrink,
    squared_error,
)
from quant_fairness_plugin.quantize.grid_rules import check_grid, group_count
from quant_fairness_plugin.quantize.moments import GroupMoments

__all__ = ["SMALLEST_SCALE", "QuantizedTensor", "fit_grid", "quantize_rtn", "to_integers"]


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


def fit_grid(
    weight: Tensor, grid: Grid, *, scale_dtype: torch.dtype, inputs: GroupMoments | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points for a weight.

    Symmetric: scale = 2 absmax / (2^bits - 1) and zero = 2^(bits-1), the convention of the GPTQ toolchains, where the
    range is not quite centred: absmax itself is clipped by half a step on the positive side.

    Clipping rules: `absmax` covers the whole range. `mse` shrinks it, in steps of 1 %, to the least squared error;
    `empirical` takes the best of all scales by that measure. `gaussian`, `laplace` and `student-t` take the range that
    is best for a distribution of the group's width. `minimax` shrinks it to the least output error of
    the language that suffers most, each against its 16-bit output energy.

    Args:
        weight: float `[rows, cols]`, not changed.
        grid: bits, group size, symmetry and clipping rule.
        scale_dtype: dtype in which scales will be stored.
        inputs: what `minimax` needs, and no other rule uses.

    Returns:
        Scales `[rows, groups]` in `scale_dtype` and zeros `[rows, groups]` in uint8.

    Raises:
        ConfigError: the grid is not a grid, its group does not divide the columns, or `minimax` lacks its inputs.
        ArtifactError: the weight holds NaN or infinity.
        UnsupportedModelError: a scale is too large for `scale_dtype`.
    """
    check_grid(grid)
    rows, cols = weight.shape
    groups = group_ranges(weight.view(rows, group_count(grid, cols), -1), symmetric=grid.symmetric)
    if not torch.isfinite(groups.high - groups.low).all():
        raise ArtifactError(
            "the weight holds NaN or infinity; only finite weights can be quantized. Check the model file"
        )
    scales, zeros = fit_range(groups.low, groups.high, grid, scale_dtype)
    if not torch.isfinite(scales).all():
        largest = float(torch.maximum(groups.high, -groups.low).max())
        raise UnsupportedModelError(
            f"the scale of a weight of magnitude {largest:.3g} is too large for {scale_dtype}; "
            "load a bfloat16 checkpoint of the model"
        )
    return _clipped(groups, grid, (scales, zeros), inputs)


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


def _clipped(groups: Groups, grid: Grid, full: Fit, inputs: GroupMoments | None) -> Fit:
    """The grid of the full range, changed as the clipping rule says."""
    match grid.clip:
        case "absmax":
            return full
        case "mse":
            return shrink(
                groups, grid, full, lambda scales, zeros: squared_error(groups.values, scales, zeros, grid.bits)
            )
        case "empirical":
            return clip_exactly(groups, grid, full)
        case "minimax":
            if inputs is None:
                raise ConfigError(
                    "clip 'minimax' needs what each language feeds into the module, which only calibration knows; "
                    "use method 'gptq' with given layers (not 'auto', which sweeps by rounding), or clip 'mse'"
                )

            def worst(scales: Tensor, zeros: Tensor) -> Tensor:
                return inputs.worst_error(rounding_error(groups.values, scales, zeros, grid.bits))

            return shrink(groups, grid, full, worst, stride=DEAR_STRIDE)
        case _:
            return clip_analytically(groups, grid, full[0].dtype)
