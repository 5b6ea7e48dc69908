"""A model and the integers that replace some of its weights: what quantizing returns and an export writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quant_fairness_plugin.artifacts import ExpertCoverage, Grid, ProtectionPlan
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.solving import dense_values


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A model and the integers that replace some of its weights. The model object itself still is in 16 bit."""

    loaded: LoadedModel
    plan: ProtectionPlan
    """What it was made by."""
    method: str
    """A name of `methods.METHODS`."""
    tensors: Mapping[str, QuantizedTensor]
    """Full module name → integers, each with its grid (an INT8 unit has other bits than the plan's grid)."""
    folded: Mapping[str, Tensor]
    """AWQ: full parameter name (`….input_layernorm.weight`, `….v_proj.bias`) → 16-bit value that replaces the model's,
    as the module stores it, float32 with values of the storage dtype; empty otherwise."""
    kept: dict[str, str]
    """Module of a quantized layer that stays in 16 bit → reason."""
    losses: dict[str, float]
    """GPTQ, AWQ: module → squared output error over squared output on the calibration text, of what the module was to
    compute; empty for RTN."""
    damping: dict[str, float]
    """GPTQ: module → damping used; empty for the others."""
    calibration: CalibrationSet | None
    backend: str = "native"
    """Who made the integers: our own core, or the name of a backend."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the backend's packages; empty for our own core."""
    columns: Mapping[str, KeptColumns] = field(default_factory=dict)
    """Full module name → the input channels that keep 16 bit beside its integers."""
    grids: Mapping[str, Grid] = field(default_factory=dict)
    """Full module name → its grid; empty where only the tensors say."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method; empty where another tool made the integers."""
    experts: ExpertCoverage | None = None
    """Of a mixture of experts: how calibration reached them, where that was counted."""

    @property
    def module_grids(self) -> dict[str, Grid]:
        """Full module name → its grid, without reading the integers where the grids are known."""
        return {name: self.grids.get(name) or self.tensors[name].grid for name in self.tensors}

    @property
    def bits(self) -> dict[str, int]:
        """Full module name → its bits."""
        return {name: grid.bits for name, grid in self.module_grids.items()}

    @property
    def grid(self) -> Grid:
        """The grid of everything that the plan does not single out."""
        return self.plan.grid

    def dense_weight(self, name: str) -> Tensor:
        """Return what a quantized module computes with, 16-bit channels included: float32 `[rows, cols]`."""
        return dense_values(self.tensors[name], self.columns.get(name))

    def dense_weights(self) -> dict[str, Tensor]:
        """Return everything that `exchange.swapped` needs to compute the quantized model.

        Full module name → dequantized weight as the module stores it, and full parameter name → folded value, in the
        parameter's dtype and device.
        """
        modules = {
            name: module for layer in range(self.loaded.layers) for name, module in self.loaded.linears(layer).items()
        }
        dense = {name: stored_form(modules[name], self.dense_weight(name)) for name in self.tensors}
        return dense | {name: value.to(self.loaded.model.get_parameter(name)) for name, value in self.folded.items()}
