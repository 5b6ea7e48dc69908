"""A protection plan: which part of a model gets which precision, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.grids import Grid
from quant_fairness_plugin.artifacts.names import Precision
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES
from quant_fairness_plugin.artifacts.units import Unit

UNSEARCHED = ("none", "explicit")
"""Sources of plans that no sentence was read for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionPlan:
    """Which units keep 16 bit, and which get 8 instead of 4.

    `units` maps `layers.<i>` to a precision, for every layer of the model; `layers.<i>.<unit>` overrides it for one
    fusion group, such as `layers.3.down`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["plan"] = "plan"
    model: str
    units: dict[str, Precision]
    grid: Grid
    source: str
    """`explicit`, `none`, `top 3 by worst`, `auto by worst under 20 % extra bytes`."""
    reasons: tuple[str, ...]
    stable: bool
    predicted: bool
    """True until the plan itself was evaluated on the confirm part."""
    extra_bytes: int
    overhead: float
    """`extra_bytes` over the bytes of the all-quantized checkpoint."""
    protect_columns: float = 0.0
    """Share of the input channels of each quantized module that keeps 16 bit beside the integers; in `extra_bytes`."""

    @classmethod
    def unprotected(cls, model: str, layers: int, grid: Grid) -> ProtectionPlan:
        """Return the plan that quantizes every layer of a model."""
        quantized = grid.precision
        return cls(
            model=model,
            units={str(Unit(i)): quantized for i in range(layers)},
            grid=grid,
            source="none",
            reasons=(),
            stable=True,
            predicted=False,
            extra_bytes=0,
            overhead=0.0,
        )

    @property
    def protected_layers(self) -> tuple[int, ...]:
        """Layers that are wholly in 16 bit, ascending."""
        return tuple(i for i in range(self.layers) if self.units[str(Unit(i))] == "fp16" and not self.overrides_in(i))

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return sum(map(Unit.is_layer, self.units))

    @property
    def quantized_precision(self) -> Precision:
        """What a layer gets that the plan does not single out."""
        return self.grid.precision

    @property
    def overrides(self) -> dict[str, Precision]:
        """Units that get neither 16 bit as a whole layer nor the grid's own bits: `layers.5` or `layers.3.down`."""
        whole = {str(Unit(i)) for i in self.protected_layers}
        return {
            name: precision
            for name, precision in self.units.items()
            if name not in whole and (Unit.is_group(name) or precision != self.quantized_precision)
        }

    @property
    def singled_out(self) -> dict[str, Precision]:
        """Layers and units that get something else than the grid's own bits, whole layers in 16 bit included."""
        return {name: kind for name, kind in self.units.items() if kind != self.quantized_precision}

    def overrides_in(self, layer: int) -> dict[str, Precision]:
        """Fusion groups of a layer with a precision of their own, by name within the layer."""
        prefix = f"{Unit(layer)}."
        return {name.removeprefix(prefix): kind for name, kind in self.units.items() if name.startswith(prefix)}
