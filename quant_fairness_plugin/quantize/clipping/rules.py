"""The scale of every group of a weight, by each clipping rule. `grid.fit_grid` is made of these.

Takes weights in groups `[rows, groups, size]` and the range that they span; returns stored scales and zero points
`[rows, groups]`. Every rule judges a scale as it will be stored (16 bit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.clipping.theory import DOF_POINTS, alpha_by_tail, optimal_alpha

SHRINK_STEPS = 80
"""Candidate ranges of the searches that shrink: 1.00, 0.99, … 0.21 of the largest magnitude."""
DEAR_STRIDE = 4
"""Steps between the first candidates where every try costs a matrix product per language."""
SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
"""float16 down to its subnormals, which real weights need; the others stop where float32 arithmetic may flush to 0."""

Fit = tuple[Tensor, Tensor]
"""Stored scales and uint8 zero points, `[rows, groups]` each."""


@dataclass(frozen=True, slots=True)
class Groups:
    """A weight in groups, and the range of each."""

    values: Tensor
    """float `[rows, groups, size]`."""
    low: Tensor
    """`[rows, groups]`, never above 0, so that 0 is on the grid."""
    high: Tensor
    """`[rows, groups]`, never below 0."""


def group_ranges(values: Tensor, *, symmetric: bool) -> Groups:
    """Lowest and highest value of each group `[rows, groups, size]`, always with 0 between them."""
    low, high = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return Groups(values, low, high)


def fit_range(low: Tensor, high: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Fit:
    """The grid that spans a range: its step rounded to `scale_dtype`, its zero point to an integer."""
    steps = 2**grid.bits - 1
    scales = ((high - low) / steps).to(scale_dtype)
    # A group of zeros, or of values below half of the smallest 16-bit number, would divide by zero.
    scales = scales.clamp(min=SMALLEST_SCALE[scale_dtype])
    if grid.symmetric:
        zeros = torch.full_like(low, 2 ** (grid.bits - 1))
    else:
        zeros = torch.round(-low / scales.to(low.dtype)).clamp(0, steps)
    return scales, zeros.to(torch.uint8)


def rounding_error(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """What rounding adds to each value, negated: quantized minus true, of the shape of `values`."""
    scale = scales.to(values.dtype).unsqueeze(2)
    zero = zeros.unsqueeze(2)
    levels = torch.round(values / scale).add_(zero).clamp_(0, 2**bits - 1)
    return levels.sub_(zero).mul_(scale).sub_(values)


def squared_error(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The squared rounding error of each group, `[rows, groups]`."""
    return rounding_error(values, scales, zeros, bits).square_().sum(2)


def shrink(groups: Groups, grid: Grid, full: Fit, error: Callable[[Tensor, Tensor], Tensor], *, stride: int = 1) -> Fit:
    """The full range, shrunk by the factor that gives the least error, for each group on its own.

    Args:
        groups: the weight.
        grid: bits and symmetry.
        full: the grid of the full range.
        error: `(scales, zeros)` → error of each group, `[rows, groups]`.
        stride: where errors are dear, only every so many percent are tried, and then those around the best.
    """
    (scales, zeros), least = full, error(*full)
    percent = torch.zeros_like(groups.low, dtype=torch.float64)
    tries = [torch.full_like(percent, step) for step in range(stride, SHRINK_STEPS, stride)]
    for around in (False, True):
        if around:
            tries = [(percent + offset).clamp(0, SHRINK_STEPS - 1) for offset in range(1 - stride, stride) if offset]
        for candidate in tries:
            keep = (1 - candidate / 100).to(groups.low.dtype)
            new_scales, new_zeros = fit_range(groups.low * keep, groups.high * keep, grid, scales.dtype)
            loss = error(new_scales, new_zeros)
            better = loss < least
            least, percent = torch.where(better, loss, least), torch.where(better, candidate, percent)
            scales, zeros = torch.where(better, new_scales, scales), torch.where(better, new_zeros, zeros)
    return scales, zeros


def clip_analytically(groups: Groups, grid: Grid, scale_dtype: torch.dtype) -> Fit:
    """The range that is best for a distribution of the group's own width: `gaussian`, `laplace` or `student-t`.

    Symmetric grids are centred on 0 and take the spread around 0; the others are centred on the group's mean. The
    degrees of freedom of the Student-t distribution come from the excess kurtosis of a whole output channel: that of
    each group (sample kurtosis, unbiased for a Gaussian), averaged over its groups, since one of 32 to 128 values says
    little about tails. A range that reaches past the group's own values is cut there.
    """
    centre = torch.zeros_like(groups.low) if grid.symmetric else groups.values.mean(2)
    deviations = groups.values - centre.unsqueeze(2)
    if grid.clip == "laplace":
        alpha = optimal_alpha(grid.bits, "laplace", symmetric=grid.symmetric) * deviations.abs().mean(2)
    else:
        sigma = deviations.square().mean(2).sqrt()
        if grid.clip == "gaussian":
            alpha = optimal_alpha(grid.bits, "gaussian", symmetric=grid.symmetric) * sigma
        else:
            alpha = _student_alpha(groups.values, grid).unsqueeze(1) * sigma
    low = torch.maximum(groups.low, centre - alpha).clamp(max=0)
    high = torch.minimum(groups.high, centre + alpha).clamp(min=0)
    return fit_range(low, high, grid, scale_dtype)


def _student_alpha(values: Tensor, grid: Grid) -> Tensor:
    """Thresholds in sigma `[rows]`, between the points of `alpha_by_tail` along a straight line."""
    excess = channel_kurtosis(values).clamp(min=0)
    place = excess / (4 * excess + 6) * 4 * (DOF_POINTS - 1)  # 1 / dof, in steps of the table
    table = torch.from_numpy(alpha_by_tail(grid.bits, symmetric=grid.symmetric)).to(values)
    left = place.floor().clamp(max=DOF_POINTS - 2)
    below, above = table[left.long()], table[left.long() + 1]
    return below + (above - below) * (place - left)


def channel_kurtosis(values: Tensor) -> Tensor:
    """The excess kurtosis of each output channel: the mean over its groups of the bias-corrected sample kurtosis (G2).

    A group has none where its values are all the same or fewer than four. A channel without any counts as Gaussian, 0:
    either all its groups are constant, and then nothing is clipped, or the groups are too small for tails.

    Args:
        values: `[rows, groups, size]`.

    Returns:
        `[rows]`.
    """
    n = values.shape[2]
    if n < 4:
        return torch.zeros_like(values[:, 0, 0])
    deviations = values - values.mean(2, keepdim=True)
    # In units of the largest, so that neither tiny weights vanish nor large ones overflow in the fourth power.
    largest = deviations.abs().amax(2, keepdim=True)
    unit = deviations / torch.where(largest > 0, largest, 1.0)
    variance = unit.square().mean(2)
    varies = largest.squeeze(2) > torch.finfo(values.dtype).eps * values.abs().amax(2)
    biased = unit.pow(4).mean(2) / torch.where(varies, variance.square(), 1.0) - 3
    corrected = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * biased + 6)
    return torch.where(varies, corrected, 0.0).sum(1) / varies.sum(1).clamp(min=1)
