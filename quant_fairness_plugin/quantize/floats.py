"""The scale of every group of a weight whose codes are floats.

Floats are as dense for a small group as for a large one, so a scale decides where the largest values are cut and little
else; clip `mse` tries those around it that the file can hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.quantize.clipping.rules import SMALLEST_SCALE
from quant_fairness_plugin.quantize.codes import codes_of
from quant_fairness_plugin.quantize.schemes import E4M3, FloatScheme, find_scheme

OCTAVES = 2
"""How many factors of two clip `mse` goes below the scale of the full range."""
MOST_EXPONENT = 126
"""Powers of two up to this, and their inverses, are normal numbers in float32 and bfloat16."""
LARGEST_CODES = {torch.float8_e4m3fn: len(E4M3) - 1, torch.float8_e8m0fnu: 127 + MOST_EXPONENT}
"""Of scales of 8 bits; the smallest is 1 in both, a number above 0."""


def divisor_of(largest: float, scheme: FloatScheme) -> Tensor:
    """Return what NVFP4 divides the scales of a matrix by, float32 `[1]`: scales are as large as E4M3 holds.

    It is a power of two. Then no product of number, scale and divisor has more than eight bits, and readers that
    unpack into bfloat16 (compressed-tensors) get the very values that were measured.

    Args:
        largest: the largest magnitude of the matrix, or of all that have the same divisor.
        scheme: whose numbers it has.
    """
    if not largest:
        return torch.ones(1)
    _, exponent = math.frexp(E4M3[-1] * scheme.largest / largest)
    return torch.tensor([2.0 ** max(-MOST_EXPONENT, min(exponent - 1, MOST_EXPONENT))])


def fit_floats(values: Tensor, grid: Grid, *, divisor: Tensor | None, scale_dtype: torch.dtype) -> Tensor:
    """Return the scales of groups, `[rows, groups]`, as they are stored.

    Args:
        values: finite float `[rows, groups, size]`, not changed.
        grid: of a scheme of floats.
        divisor: what all of them are divided by.
        scale_dtype: dtype of scales that are stored in 16 bit.

    Raises:
        UnsupportedModelError: a scale is too large for `scale_dtype`.
    """
    scheme = find_scheme(grid)
    assert scheme is not None, "the caller has asked"
    factor = 1.0 if divisor is None else float(divisor)
    full = values.abs().amax(2) / scheme.largest * factor
    best = stored(full, scheme, scale_dtype)
    if not torch.isfinite(best.float()).all():
        raise UnsupportedModelError(
            f"the scale of a weight of magnitude {float(values.abs().max()):.3g} is too large for {scale_dtype}; "
            "load a bfloat16 checkpoint of the model"
        )
    if grid.clip != "mse":
        return best
    least = _squared_error(values, best.float() / factor, grid)
    for scales in _neighbours(full, best, scheme):
        error = _squared_error(values, scales.float() / factor, grid)
        better = error < least
        least = torch.where(better, error, least)
        # Floats of 8 bits know no `where`; their bits do.
        best = torch.where(better, _bits(scales), _bits(best)).view(best.dtype)
    return best


def stored(scales: Tensor, scheme: FloatScheme, scale_dtype: torch.dtype) -> Tensor:
    """Return scales as the scheme stores them: rounded to nearest, a power of two up to the next; never 0."""
    match scheme.scale:
        case "16bit":
            return scales.to(scale_dtype).clamp(min=SMALLEST_SCALE[scale_dtype])
        case "e4m3":
            return scales.clamp(E4M3[1], E4M3[-1]).to(torch.float8_e4m3fn)
        case "e8m0":
            mantissa, exponent = torch.frexp(scales)
            exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
            exponent = torch.where(scales > 0, exponent, -MOST_EXPONENT).clamp(-MOST_EXPONENT, MOST_EXPONENT)
            return torch.exp2(exponent.float()).to(torch.float8_e8m0fnu)


def _neighbours(full: Tensor, rounded: Tensor, scheme: FloatScheme) -> Iterator[Tensor]:
    """Yield the scales that clip `mse` tries beside that of the full range, as they are stored."""
    if scheme.scale == "16bit":
        for step in range(1, scheme.below + 1):
            yield stored(full * 2.0 ** (-OCTAVES * step / scheme.below), scheme, rounded.dtype)
        return
    # Positive floats are ordered as their bits are: these are all that there are.
    codes = _bits(rounded).int()
    largest = LARGEST_CODES[rounded.dtype]
    for step in range(-scheme.above, scheme.below + 1):
        if step:
            yield (codes - step).clamp(1, largest).to(torch.uint8).view(rounded.dtype)


def _bits(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8 if scales.dtype.itemsize == 1 else torch.int16)


def _squared_error(values: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """Return the squared rounding error of each group, `[rows, groups]`."""
    codes, step = codes_of(grid), steps.unsqueeze(2)
    none = torch.zeros((), dtype=torch.uint8, device=values.device)
    rounded = codes.numbers(codes.nearest(values / step, none), none, values.dtype) * step
    return (rounded - values).square_().sum(2)
