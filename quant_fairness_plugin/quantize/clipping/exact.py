"""The best scale of a group for the very values in it, without a model of their distribution.

Between two *breakpoints* of the scale (where some value changes its integer) the squared error is a parabola in the
scale. So the best of all scales is found by going through the breakpoints in order and taking, on each stretch between
two, the stored (16-bit) scales next to the parabola's lowest point: no other on the stretch can be better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.clipping.rules import SMALLEST_SCALE, Fit, Groups, squared_error

SMALLEST_SHARE = 0.01
"""The search goes down to this share of the full range's scale; groups of 128 of the bundled model need 0.4."""
CHUNK_VALUES = 2**17
"""Weights whose breakpoints are held at once: some 100 MB."""
BITS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Positive floats are ordered as their bits are."""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Groups, one per row, in float64, with the zero point that is tried and the scales between which is searched."""

    values: Tensor
    """`[groups, size]`."""
    caps: Tensor
    """`[groups, size]`: how many levels the grid has on the value's side of 0."""
    least: Tensor
    """`[groups]`: no scale below this can be the best one."""
    most: Tensor
    """`[groups]`: at this scale nothing is clipped."""


def clip_exactly(groups: Groups, grid: Grid, full: Fit) -> Fit:
    """The stored scale of least squared error, among all that the scales' dtype has.

    Searched between a hundredth of the full range's scale and the scale at which nothing at all is clipped. On
    asymmetric grids the zero point may move by one from that of the full range.

    Args:
        groups: the weight.
        grid: bits and symmetry.
        full: the grid of the full range; the result is never worse than this.
    """
    rows, count, size = groups.values.shape
    values, scales, zeros = groups.values.reshape(-1, size), full[0].flatten(), full[1].flatten()
    chunk = max(1, CHUNK_VALUES // size)
    parts = [
        _best_of_zeros(values[part], (scales[part], zeros[part]), grid)
        for part in (slice(start, start + chunk) for start in range(0, rows * count, chunk))
    ]
    return torch.cat([best for best, _ in parts]).view(rows, count), torch.cat([zero for _, zero in parts]).view(
        rows, count
    )


def _best_of_zeros(values: Tensor, full: Fit, grid: Grid) -> Fit:
    """The best scale and zero point of groups `[groups, size]`."""
    values = values.double()
    scales, zeros = full
    steps = 2**grid.bits - 1
    start, middle = scales.double(), zeros.long()
    least = squared_error(values.unsqueeze(1), scales.unsqueeze(1), zeros.unsqueeze(1), grid.bits).squeeze(1)
    for shift in (0,) if grid.symmetric else (0, -1, 1):
        zero = (middle + shift).clamp(0, steps)
        candidates = _candidates(values, start, zero, least, steps)
        candidate, error = _scan(candidates, scales.dtype)
        better = (error < least) & (candidate >= SMALLEST_SCALE[scales.dtype])
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, candidate, scales), torch.where(better, zero.to(zeros.dtype), zeros)
    return scales, zeros


def _candidates(values: Tensor, start: Tensor, zero: Tensor, least_error: Tensor, steps: int) -> _Candidates:
    """The scales worth trying: at a lower one, clipping the largest value alone costs more than `least_error`."""
    above, below = steps - zero, zero
    high, low = values.amax(1).clamp(min=0), (-values.amin(1)).clamp(min=0)
    cost = least_error.sqrt()
    lowest = torch.maximum((high - cost) / above.clamp(min=1), (low - cost) / below.clamp(min=1))
    most = torch.maximum(torch.maximum(high / above.clamp(min=1), low / below.clamp(min=1)), start)
    least = torch.minimum(torch.maximum(lowest, SMALLEST_SHARE * start), most)
    return _Candidates(values, torch.where(values > 0, above.unsqueeze(1), below.unsqueeze(1)), least, most)


def _scan(candidates: _Candidates, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each group's best scale that `dtype` has, `[groups]`, and its squared error; infinite where there is none."""
    group, upper, correlation, energy = _stretches(candidates)
    following = torch.cat([upper[1:], upper[:1]])
    last = torch.cat([group[1:] != group[:-1], torch.ones_like(group[:1], dtype=torch.bool)])
    lower = torch.where(last, candidates.least[group], following)
    whole = candidates.values.square().sum(1)
    # Σ(x - s q)² = Σx² - 2 s Σxq + s² Σq², lowest at s = Σxq / Σq².
    turning = torch.minimum(torch.maximum(correlation / energy.clamp(min=1), lower), upper)
    best_error = torch.full_like(whole, torch.inf)
    best_scale = torch.zeros_like(whole, dtype=dtype)
    for stored in _neighbours(turning, dtype):
        scale = stored.double()
        error = whole[group] - 2 * scale * correlation + scale.square() * energy
        error = torch.where((scale >= lower) & (scale <= upper), error, torch.inf)
        least = best_error.scatter_reduce(0, group, error, "amin")
        winner = (error == least[group]) & (error < best_error[group])
        best_scale[group[winner]] = stored[winner]
        best_error = least
    return best_scale, best_error


def _stretches(candidates: _Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All stretches of scales in which no value changes its integer, group by group, from the largest scale down.

    Returns:
        For each stretch its group, the scale at its upper end, and there Σxq and Σq².
    """
    size, caps = candidates.values.abs(), candidates.caps.double()
    most, least = candidates.most.unsqueeze(1), candidates.least.unsqueeze(1)
    first = torch.minimum(torch.round(size / most), caps)
    passed = (torch.minimum(torch.round(size / least), caps) - first).long().clamp(min=0).flatten()
    source = torch.repeat_interleave(torch.arange(passed.numel(), device=passed.device), passed)
    nth = torch.arange(source.numel(), device=passed.device) - (passed.cumsum(0) - passed)[source]
    level = first.flatten()[source] + nth  # the integer above the breakpoint; below it is one larger
    value = size.flatten()[source]
    groups = torch.arange(len(size), device=size.device)
    group = torch.cat([groups, source // size.shape[1]])
    upper = torch.cat([candidates.most, value / (level + 0.5)])
    correlation = torch.cat([(size * first).sum(1), value])
    energy = torch.cat([first.square().sum(1), 2 * level + 1])
    depth = (candidates.most[group] - upper) / (candidates.most - candidates.least).clamp(min=1e-300)[group]
    depth[: len(groups)] = -1.0
    order = torch.argsort(group + depth.clamp(max=1.0) / 4)  # a quarter keeps the groups apart, and -1 first
    group, upper, correlation, energy = group[order], upper[order], correlation[order], energy[order]
    return group, torch.minimum(upper, candidates.most[group]), _within(correlation, group), _within(energy, group)


def _within(change: Tensor, group: Tensor) -> Tensor:
    """Running sums that start anew in each group; `group` is sorted."""
    total = change.cumsum(0)
    begins = torch.searchsorted(group, group)
    return total - (total - change)[begins]


def _neighbours(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` next to positive ones: at or below, and at or above."""
    near = scale.to(dtype)
    bits = near.view(BITS_OF[dtype])
    below = torch.where(near.double() > scale, bits - 1, bits).view(dtype)
    above = torch.where(near.double() < scale, bits + 1, bits).view(dtype)
    return below, above
