"""AWQ: scale input channels so that rounding hurts the outputs least.

Takes the weights `[rows, cols]` of a fusion group, their Hessians and the mean magnitude of their common input; returns
the integers of each scaled weight. Written from Lin et al., "AWQ" (arXiv 2306.00978, section 3.2): channels that carry
large inputs are multiplied by a scale before rounding, which makes their relative error smaller, and the module in
front is divided by it. A candidate is judged by the fair objective tr(ΔW H ΔWᵀ), summed over the fusion group, where
ΔW = Q(W s) / s - W. Then the range of every group of every row is shrunk where that lowers its part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.gptq import output_loss
from quant_fairness_plugin.quantize.grid import QuantizedTensor, fit_grid, quantize_rtn, to_integers
from quant_fairness_plugin.quantize.moments import check_finite

RATIOS = 20
"""Exponents of the input magnitude: 0, 1/20, … 19/20, as in the paper's grid search."""
KEPT_RANGES = tuple(1 - step / 20 for step in range(1, 11))
"""Shares of a group's largest magnitude that clipping may keep, down to half, as AWQ's authors search them."""
SMALLEST_SHARE = 1e-4
"""Channels below this share of the largest input are scaled as if they had it: a power of 0 has no end."""


@dataclass(frozen=True, slots=True)
class AwqResult:
    """A solved weight and what the solution cost."""

    tensor: QuantizedTensor
    """Of the weight times the scale."""
    loss_relative_to_output_energy: float
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) with ΔW = Q / scale - W."""


@torch.no_grad()
def solve_awq(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    magnitude: Tensor,
    grids: Mapping[str, Grid],
    *,
    scale_dtype: torch.dtype,
    effective: Callable[[Tensor], Tensor] | None,
    clipped: Collection[str],
) -> tuple[dict[str, AwqResult], Tensor]:
    """Quantize the weights of one fusion group, scaled per input channel.

    Args:
        weights: module → float `[rows, cols]`, not changed.
        hessians: module → second moment of the common inputs `[cols, cols]`, as `fair_moments` weighs it.
        magnitude: mean of the inputs' magnitude `[cols]`, in any unit.
        grids: module → its grid. Where its clipping rule is not `absmax`, that rule sets the ranges.
        scale_dtype: dtype in which the grids' scales will be stored.
        effective: the scale that the module in front is really divided by instead of the wanted one
            (`folding.Source.effective`); None where there is no such module, and no channel is scaled.
        clipped: modules whose ranges are searched. The products of q and k magnify what is clipped in either.

    Returns:
        Module → result, and the scale `[cols]` by which the weights were multiplied.

    Raises:
        ConfigError: a grid that is not a grid, or whose group does not divide the columns.
        ArtifactError: a weight holds NaN or infinity.
        UnsolvableError: the Hessian holds NaN or infinity.
        UnsupportedModelError: a scale is too large for `scale_dtype`.
    """
    check_finite(*hessians.values())
    wide = {name: weight.float() for name, weight in weights.items()}
    scale = torch.ones_like(magnitude)
    if effective is not None:
        scale = _search_scale(wide, hessians, magnitude, grids, scale_dtype=scale_dtype, effective=effective)
    results: dict[str, AwqResult] = {}
    for name, weight in wide.items():
        if name in clipped and grids[name].clip == "absmax":
            hessian = hessians[name].float() / torch.outer(scale, scale)
            tensor = _clip(weight * scale, hessian, grids[name], scale_dtype=scale_dtype)
        else:
            tensor = quantize_rtn(weight * scale, grids[name], scale_dtype=scale_dtype)
        loss = output_loss(weight, tensor.dequantize() / scale, hessians[name])
        results[name] = AwqResult(tensor, loss)
    return results, scale


def _search_scale(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    magnitude: Tensor,
    grids: Mapping[str, Grid],
    *,
    scale_dtype: torch.dtype,
    effective: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the candidate with the least loss, summed over the fusion group; the first of equals."""
    best, least = effective(torch.ones_like(magnitude)), float("inf")
    for wanted in _candidates(magnitude):
        scale, loss = effective(wanted), 0.0
        for name, weight in weights.items():
            rounded = quantize_rtn(weight * scale, grids[name], scale_dtype=scale_dtype)
            loss += output_loss(weight, rounded.dequantize() / scale, hessians[name])
        if loss < least:
            best, least = scale, loss
    return best


def _candidates(magnitude: Tensor) -> Iterator[Tensor]:
    """Yield scales to try, each with its largest and smallest value as far above 1 as below; the first one is 1."""
    floor = SMALLEST_SHARE * float(magnitude.max())
    inputs = magnitude.clamp(min=floor) if floor > 0 else torch.ones_like(magnitude)
    for step in range(RATIOS):
        scale = inputs ** (step / RATIOS)
        yield scale / (scale.max() * scale.min()).sqrt()


def _clip(weight: Tensor, hessian: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Return the weight on its grid, with the range of every group of every row at the least of its output error."""
    scales, zeros = fit_grid(weight, grid, scale_dtype=scale_dtype)
    grouped = weight.view(*scales.shape, -1)
    width = grouped.shape[2]
    starts = range(0, len(hessian), width)
    blocks = torch.stack([hessian[start : start + width, start : start + width] for start in starts])
    largest = grouped.abs().amax(2, keepdim=True)
    least = _group_loss(grouped, scales, zeros, grid, blocks)
    # With zero points, cutting the longer side of a range and shrinking both are two things.
    cut = (torch.clamp(grouped, -keep * largest, keep * largest) for keep in KEPT_RANGES)
    shrunk = (grouped * keep for keep in KEPT_RANGES)
    for limited in chain(cut, () if grid.symmetric else shrunk):
        new_scales, new_zeros = fit_grid(limited.view_as(weight), grid, scale_dtype=scale_dtype)
        loss = _group_loss(grouped, new_scales, new_zeros, grid, blocks)
        better = loss < least
        least = torch.where(better, loss, least)
        scales, zeros = torch.where(better, new_scales, scales), torch.where(better, new_zeros, zeros)
    integers = to_integers(grouped, scales.unsqueeze(2), zeros.unsqueeze(2), bits=grid.bits)
    return QuantizedTensor(integers=integers.view_as(weight), scales=scales, zeros=zeros, grid=grid)


def _group_loss(grouped: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, blocks: Tensor) -> Tensor:
    """Δw H Δwᵀ `[rows, groups]` of every group by itself, with the block of H that belongs to its channels."""
    zero = zeros.unsqueeze(2)
    levels = to_integers(grouped, scales.unsqueeze(2), zero, bits=grid.bits)
    error = ((levels.float() - zero) * scales.float().unsqueeze(2) - grouped).transpose(0, 1)
    return ((error @ blocks) * error).sum(2).T
