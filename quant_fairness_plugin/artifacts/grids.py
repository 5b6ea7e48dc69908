"""The integer grid of quantized weights."""

from __future__ import annotations

from dataclasses import dataclass

from quant_fairness_plugin.artifacts.names import Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """An integer grid: which values a quantized weight can take.

    `group_size` input channels share a scale: 32, 64, 128, or -1 for one scale per output channel. Of a whole model it
    is the largest: a fusion group whose input channels it does not divide takes the largest of 64 and 32 that does.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    clip: Clip = "absmax"

    def __str__(self) -> str:
        return f"int{self.bits} {self.groups} {'sym' if self.symmetric else 'asym'} {self.clip}"

    @property
    def groups(self) -> str:
        """The group size as people read it: `g128`, or `channel`."""
        return "channel" if self.group_size == -1 else f"g{self.group_size}"
