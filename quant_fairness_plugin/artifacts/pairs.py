"""Two checkpoints of one 16-bit model against each other. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.measurements import Measurement
from quant_fairness_plugin.artifacts.numbers import Interval, Number
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPair:
    """The damage of two checkpoints on the same sentences, and its differences: second minus first: above 0 is worse.

    They are of KL to the 16-bit model in bits per byte, sentence by sentence: what makes a sentence hard for both
    widens no interval.
    """

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["checkpoint-pair"] = "checkpoint-pair"
    first: Measurement
    second: Measurement
    differences: dict[str, Interval]
    """Language → difference, for those that the 16-bit model knows and neither checkpoint has lost."""
    worst: Number
    """Difference of the two largest losses over these languages, which need not be of one language."""
    mean: Number

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Languages that the second checkpoint has lost, and the first has not."""
        rows = zip(self.first.languages, self.second.languages, strict=True)
        return tuple(b.language for a, b in rows if a.status == "supported" and b.status == "collapsed")
