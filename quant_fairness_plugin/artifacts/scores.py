"""What one pass of gradients predicts of every unit: enough to plan for any budget without the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.grids import Grid
from quant_fairness_plugin.artifacts.names import Precision, Status
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES, Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitScores:
    """For every unit, precision and language: the KL to the 16-bit model that this unit's rounding error alone causes.

    To second order: ½ E[(g · ΔW)²], where ΔW is the rounding error and g the gradient of the log-probability of labels
    that are drawn from the 16-bit model itself. What several units cause together is taken to be the sum.
    """

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["scores"] = "scores"
    provenance: Provenance
    layers: int
    grid: Grid
    precisions: tuple[Precision, ...]
    """What a unit can get: the grid's own precision first; 16 bit, whose error is 0, is not listed."""
    errors: str
    """Whose rounding errors these are, such as `gptq int4 g64 sym mse`."""
    languages: dict[str, Status]
    draws: int
    """Labels drawn for each token."""
    bytes_: dict[str, tuple[int, ...]]
    """Language → UTF-8 bytes of the scored tokens of each sentence; supported languages only."""
    kl_nats: dict[str, dict[Precision, dict[str, tuple[float, ...]]]]
    """Unit → precision → language → nats of each sentence. Units in forward order."""
    layer_bytes: dict[str, tuple[int, ...]]
    """As in `SweepReport`."""
    other_bytes: int
    """As in `SweepReport`."""
    condition: str = ""
    """As in `SweepReport`."""

    @property
    def units(self) -> tuple[str, ...]:
        """The units that have scores, in forward order."""
        return tuple(self.kl_nats)
