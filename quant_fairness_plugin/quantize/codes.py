"""What the codes of a grid stand for, in units of its scale: integers less a zero point, or floats.

Whatever rounds (to nearest, GPTQ's columns, its refinement) asks `codes_of(grid)` for the nearest code and for the
values of codes, and need not know which kind they are.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.schemes import FloatScheme, find_scheme


class Codes(Protocol):
    """The codes of a grid."""

    @property
    def zero(self) -> int:
        """The code of 0 on a symmetric grid."""

    def nearest(self, values: Tensor, zeros: Tensor) -> Tensor:
        """Return the code of the nearest number, ties to even, as uint8.

        Args:
            values: float, in units of the scale.
            zeros: the codes of 0, of a shape that broadcasts to that of `values`.
        """

    def numbers(self, codes: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what codes stand for, in units of the scale."""

    def limits(self, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest number around each code of 0, in the dtype of `zeros`."""

    def round_(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        """Put in place of values what the codes of `nearest` stand for.

        Args:
            values: float, in units of the scale.
            lowest: the first of `limits`.
            highest: the second.
        """


class Integers:
    """Integers of some bits; a number is an integer less the zero point."""

    def __init__(self, bits: int) -> None:
        self._top = 2**bits - 1
        self.zero = 2 ** (bits - 1)

    def nearest(self, values: Tensor, zeros: Tensor) -> Tensor:
        """Return the nearest integers plus the zero point, cut to the range."""
        return (torch.round(values) + zeros).clamp_(0, self._top).to(torch.uint8)

    def numbers(self, codes: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return codes less the zero point."""
        return codes.to(dtype) - zeros

    def limits(self, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range, less the zero point."""
        return -zeros, self._top - zeros

    def round_(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        """Put the nearest integers within the range, less the zero point, in place of values."""
        values.round_().clamp_(lowest, highest)


class Floats:
    """Floats of a sign bit and a magnitude that grows with its bits; 0 is code 0."""

    zero = 0

    def __init__(self, bits: int, magnitudes: tuple[float, ...]) -> None:
        self._sign = 2 ** (bits - 1)
        self._table = torch.tensor([*magnitudes, *[torch.nan] * (self._sign - len(magnitudes))], dtype=torch.float64)
        self._table = torch.cat([self._table, -self._table])
        middles = torch.tensor(magnitudes, dtype=torch.float64)
        self._middles = (middles[1:] + middles[:-1]) / 2
        self._sized: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def nearest(self, values: Tensor, zeros: Tensor) -> Tensor:
        """Return the codes of the nearest floats; what is larger than all of them gets the largest."""
        middles, _ = self._of(values)
        codes = torch.bucketize(values.abs(), middles).to(torch.uint8)
        return torch.where((values < 0) & (codes > 0), codes + self._sign, codes)

    def numbers(self, codes: Tensor, zeros: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the floats of codes."""
        _, table = self._of(torch.empty(0, dtype=dtype, device=codes.device))
        return table[codes.int()]

    def limits(self, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest float of either sign."""
        largest = torch.full_like(zeros, float(self._table.nan_to_num().max()))
        return -largest, largest

    def round_(self, values: Tensor, lowest: Tensor, highest: Tensor) -> None:
        """Put the nearest floats in place of values; what is larger than all of them is known without the limits."""
        values.copy_(self.numbers(self.nearest(values, values), values, values.dtype))

    def _of(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the middles between magnitudes and the table of numbers, both exact in the dtype of a tensor."""
        key = (like.dtype, like.device)
        if key not in self._sized:
            middles = self._middles.to(like)
            # A tie goes to the lower neighbour; below every second middle, so that it goes to the even one.
            lower = torch.nextafter(middles, torch.zeros_like(middles))
            middles[1::2] = lower[1::2]
            self._sized[key] = middles, self._table.to(like)
        return self._sized[key]


@cache
def _floats(scheme: FloatScheme) -> Floats:
    return Floats(scheme.bits, scheme.numbers)


def codes_of(grid: Grid) -> Codes:
    """Return the codes of a grid."""
    scheme = find_scheme(grid)
    return Integers(grid.bits) if scheme is None else _floats(scheme)
