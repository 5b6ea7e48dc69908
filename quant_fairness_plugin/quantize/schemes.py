"""Schemes whose codes are floats: what their numbers are, what scales them, and what that takes on disk. No torch.

The numbers are those of the OCP formats E2M1 and E4M3 (Microscaling Formats 1.0; OFP8 1.0): a sign bit, then a
magnitude whose order is that of its bits. NVFP4 divides the scales of a matrix by one number more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quant_fairness_plugin.artifacts import Clip, Grid, SchemeName

ScaleKind = Literal["16bit", "e4m3", "e8m0"]
"""How a scale is stored: in the 16-bit type of the model, as a float of 8 bits, or as a power of two."""
FLOAT_CLIPS: tuple[Clip, ...] = ("absmax", "mse")
"""The rules that judge a scale by nothing but the numbers of a grid; the others know the spacing of integers."""


def magnitudes(exponent_bits: int, mantissa_bits: int, *, names: int) -> tuple[float, ...]:
    """Return the magnitudes of a float format in the order of their bits, from 0.

    Args:
        exponent_bits: their bias is half of their range, as in IEEE 754.
        mantissa_bits: bits behind the point.
        names: how many codes stand for a number; the last of E4M3 is not one.
    """
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = []
    for code in range(names):
        exponent, mantissa = divmod(code, steps)
        # Exponent 0 has no leading 1, and the step of exponent 1.
        value = (mantissa + (steps if exponent else 0)) / steps
        values.append(value * 2.0 ** (max(exponent, 1) - bias))
    return tuple(values)


E2M1 = magnitudes(2, 1, names=8)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6."""
E4M3 = magnitudes(4, 3, names=127)
"""0, 2⁻⁹, … 448."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatScheme:
    """One scheme of float codes for a whole model."""

    name: SchemeName
    bits: int
    group_size: int
    """Input channels that share a scale; -1: all of a row."""
    numbers: tuple[float, ...]
    """Magnitudes of the codes without their sign, ascending."""
    scale: ScaleKind
    scale_bytes: int
    divided: bool = False
    """Whether each matrix has one number that divides its scales; modules that servers merge have the same one."""
    above: int
    """How many scales above that of the full range clip `mse` tries: the largest number of a group may be 4, not 6."""
    below: int
    """How many it tries below; two factors of two in all."""

    @property
    def largest(self) -> float:
        """The largest number."""
        return self.numbers[-1]

    def grid(self, clip: Clip) -> Grid:
        """Return the grid of this scheme."""
        return Grid(bits=self.bits, group_size=self.group_size, symmetric=True, clip=clip, scheme=self.name)


SCHEMES: dict[str, FloatScheme] = {
    scheme.name: scheme
    for scheme in (
        FloatScheme(
            name="fp8", bits=8, group_size=-1, numbers=E4M3, scale="16bit", scale_bytes=2, above=0, below=32
        ),
        FloatScheme(
            name="nvfp4", bits=4, group_size=16, numbers=E2M1, scale="e4m3", scale_bytes=1, divided=True,
            above=5, below=16,
        ),
        FloatScheme(
            name="mxfp4", bits=4, group_size=32, numbers=E2M1, scale="e8m0", scale_bytes=1, above=1, below=2
        ),
    )
}  # fmt: skip
"""Name → scheme; beside them there is `int`."""
DIVISOR_BYTES = 4


def find_scheme(grid: Grid) -> FloatScheme | None:
    """Return the scheme of a grid; None where its codes are integers."""
    return SCHEMES.get(grid.scheme)
