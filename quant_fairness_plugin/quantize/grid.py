"""Grids on tensors: fit scales and zero points, round to them, and read the weights back.

Takes weights `[rows, cols]` = `[output channels, input channels]`; returns a `QuantizedTensor`.
Codes are always rounded against the scale as it will be stored (16 or 8 bit), so what is measured is what is written.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from quant_fairness_plugin.quantize.codes import Integers, codes_of
from quant_fairness_plugin.quantize.floats import divisor_of, fit_floats
from quant_fairness_plugin.quantize.grid_rules import check_grid, group_count
from quant_fairness_plugin.quantize.moments import GroupMoments
from quant_fairness_plugin.quantize.schemes import find_scheme

__all__ = [
    "SMALLEST_SCALE", "Fitted", "QuantizedTensor", "fit", "fit_grid", "quantize_rtn", "shared_largest", "to_integers",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A grid laid on a weight, before any of its values is rounded."""

    scales: Tensor
    """`[rows, groups]` in the dtype in which they are stored: 16-bit float; of some float schemes a float of 8 bits."""
    zeros: Tensor
    """uint8 `[rows, groups]`, the codes of 0: of integers 2^(bits-1) everywhere on a symmetric grid, of floats 0."""
    grid: Grid
    divisor: Tensor | None = None
    """What all scales are divided by, float32 `[1]`, where the scheme has that."""

    @property
    def steps(self) -> Tensor:
        """What codes are multiplied by, float32 `[rows, groups]`."""
        scales = self.scales.float()
        return scales if self.divisor is None else scales / self.divisor

    def coded(self, codes: Tensor) -> QuantizedTensor:
        """Return the weight of codes `[rows, cols]` on this grid."""
        return QuantizedTensor(
            integers=codes, scales=self.scales, zeros=self.zeros, grid=self.grid, divisor=self.divisor
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor(Fitted):
    """A weight as codes on a grid; value = number of the code * step, of an integer (integer - zero) * scale."""

    integers: Tensor
    """The codes, uint8 `[rows, cols]`, 0 … 2^bits - 1."""

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 `[rows, cols]`, computed from the stored scales."""
        rows, cols = self.integers.shape
        codes = self.integers.view(rows, self.scales.shape[1], -1)
        numbers = codes_of(self.grid).numbers(codes, self.zeros.unsqueeze(2))
        return (numbers * self.steps.unsqueeze(2)).view(rows, cols)


def shared_largest(weights: Iterable[Tensor], grid: Grid) -> float | None:
    """Return the largest magnitude of a fusion group; None where its modules share nothing.

    Servers merge them into one matrix, which has one divisor of its scales.
    """
    scheme = find_scheme(grid)
    return max(float(weight.abs().max()) for weight in weights) if scheme is not None and scheme.divided else None


def fit(
    weight: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    inputs: GroupMoments | None = None,
    largest: float | None = None,
) -> Fitted:
    """Return the grid of any scheme laid on a weight.

    Args:
        weight: float `[rows, cols]`, not changed.
        grid: the grid.
        scale_dtype: dtype in which scales will be stored, where the scheme leaves that open.
        inputs: what clip `minimax` needs, and no other rule uses.
        largest: of `shared_largest`; None where the weight stands alone.

    Raises:
        ConfigError: as `fit_grid`.
        ArtifactError: as `fit_grid`.
        UnsupportedModelError: as `fit_grid`.
    """
    scheme = find_scheme(grid)
    if scheme is None:
        scales, zeros = fit_grid(weight, grid, scale_dtype=scale_dtype, inputs=inputs)
        return Fitted(scales=scales, zeros=zeros, grid=grid)
    check_grid(grid)
    rows, cols = weight.shape
    values = weight.view(rows, group_count(grid, cols), -1)
    _check_finite(values)
    divisor = None
    if scheme.divided:
        divisor = divisor_of(float(weight.abs().max()) if largest is None else largest, scheme).to(weight.device)
    scales = fit_floats(values, grid, divisor=divisor, scale_dtype=scale_dtype)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8, device=weight.device)
    return Fitted(scales=scales, zeros=zeros, grid=grid, divisor=divisor)


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
    _check_finite(groups.high - groups.low)
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
    return Integers(bits).nearest(weight / scales.to(weight.dtype), zeros)


def quantize_rtn(
    weight: Tensor, grid: Grid, *, scale_dtype: torch.dtype, largest: float | None = None
) -> QuantizedTensor:
    """Round a weight to the nearest grid points (no calibration).

    Args:
        weight: float `[rows, cols]`, not changed.
        grid: the grid.
        scale_dtype: dtype in which scales will be stored.
        largest: as for `fit`.

    Raises:
        ConfigError: the grid is not a grid, or its group does not divide the columns.
        ArtifactError: the weight holds NaN or infinity.
        UnsupportedModelError: a scale is too large for `scale_dtype`.
    """
    weight = weight.float().contiguous()
    fitted = fit(weight, grid, scale_dtype=scale_dtype, largest=largest)
    grouped = weight.view(*fitted.scales.shape, -1)
    codes = codes_of(grid).nearest(grouped / fitted.steps.unsqueeze(2), fitted.zeros.unsqueeze(2))
    return fitted.coded(codes.view(weight.shape))


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ArtifactError(
            "the weight holds NaN or infinity; only finite weights can be quantized. Check the model file"
        )


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
