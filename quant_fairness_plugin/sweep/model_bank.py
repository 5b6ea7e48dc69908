"""A model that was quantized in memory, as the bank of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.sweep.bank import Bank


@dataclass(frozen=True, slots=True)
class ModelBank:
    """The weights of a quantized model at the precision of its grid, and those of another bank at all others.

    It was quantized as a whole, so its blocks saw quantized inputs: exchanged one by one its units are an approximation
    of what quantizing them one by one would give. A model whose scales moved between modules (AWQ) is no such bank.
    Weights are made again each time they are asked for, so that no more than a block's are held.
    """

    units: UnitMap
    quantized: QuantizedModel
    others: Bank

    @property
    def description(self) -> str:
        """The method and grid, and the other bank's."""
        return f"{self.quantized.method} {self.quantized.grid}; other precisions: {self.others.description}"

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        """Parameter → value as the model stores it; parameters that stay in 16 bit are left out."""
        if precision != self.quantized.plan.quantized_precision:
            return self.others.weights(unit, precision)
        names = [name.removesuffix(".weight") for name in self.units.parameters[unit]]
        model = self.quantized.loaded.model
        return {
            f"{name}.weight": stored_form(model.get_submodule(name), self.quantized.dense_weight(name))
            for name in names
            if name in self.quantized.tensors
        }
