"""The grid of quantized weights: integers, or floats of few bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant_fairness_plugin.artifacts.names import (
    FINE_GROUPS,
    FINEST_GROUP,
    Clip,
    Precision,
    SchemeName,
    bits_of_precision,
    precision_of_bits,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which values a quantized weight can take.

    `group_size` input channels share a scale: 32, 64, 128, or -1 for one scale per output channel. Of a whole model it
    is the largest: a fusion group whose input channels it does not divide takes the largest of 64 and 32 that does.
    Other schemes than `int` have bits and a group size of their own, and no zero points.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    clip: Clip = "absmax"
    scheme: SchemeName = "int"

    def __str__(self) -> str:
        if self.scheme != "int":
            return f"{self.scheme} {self.groups} {self.clip}"
        return f"int{self.bits} {self.groups} {'sym' if self.symmetric else 'asym'} {self.clip}"

    @property
    def precision(self) -> Precision:
        """The name of this grid's numbers in a plan: `int4`, `nvfp4`."""
        return precision_of_bits(self.bits) if self.scheme == "int" else self.scheme

    @property
    def numbers(self) -> str:
        """What weights are, as people write it: `4 bit`, or `NVFP4`."""
        return f"{self.bits} bit" if self.scheme == "int" else self.scheme.upper()

    def at(self, precision: Precision) -> Grid:
        """Return the grid of another precision in the same model; integers beside floats have groups of 128."""
        if precision == self.precision:
            return self
        bits = bits_of_precision(precision)
        if precision == FINE_GROUPS:
            return replace(self, bits=bits, group_size=FINEST_GROUP)
        return replace(self, bits=bits) if self.scheme == "int" else Grid(bits=bits, clip=self.clip)

    @property
    def groups(self) -> str:
        """The group size as people read it: `g128`, or `channel`."""
        return "channel" if self.group_size == -1 else f"g{self.group_size}"
