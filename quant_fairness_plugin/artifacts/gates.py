"""The most damage that a user accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quant_fairness_plugin.errors import ConfigError

GateObjective = Literal["worst", "mean"]


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on the KL to the 16-bit model, in bits per byte, over the supported languages."""

    objective: GateObjective = "worst"
    """`worst`: no language may exceed the bound; `mean`: their mean may not."""
    most: float = 0.05

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Return the gate that a text such as `worst=0.05` describes.

        Raises:
            ConfigError: another name, or no number above 0.

        >>> Gate.parse("worst=0.05")
        Gate(objective='worst', most=0.05)
        """
        name, _, value = text.partition("=")
        try:
            most = float(value)
        except ValueError:
            most = math.nan
        if name.strip() not in ("worst", "mean") or not 0 < most < math.inf:
            raise ConfigError(
                f"gate {text!r}: expected worst or mean, and a bound on the KL in bits per byte. Write worst=0.05"
            )
        return cls("worst" if name.strip() == "worst" else "mean", most)

    def __str__(self) -> str:
        return f"{self.objective}={self.most:g}"
