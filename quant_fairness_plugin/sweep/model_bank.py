"""A model that was quantized in memory, as the bank of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, bits_of_precision
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.sweep.bank import Bank

EIGHT = 8


@dataclass(frozen=True, slots=True)
class ModelBank:
    """The weights of a quantized model at the precision of its grid, what stands for them at others, and 8 bits.

    It was quantized as a whole, so its blocks saw quantized inputs: exchanged one by one its units are an approximation
    of what quantizing them one by one would give. A model whose scales moved between modules (AWQ) is no such bank.
    Weights are made again each time they are asked for, so that no more than a block's are held.

    What the method would make of other widths below 8 bits is not computed: its errors are taken to have the size there
    that rounding to nearest says, in the direction that they have on the grid. Errors of 8 bits are so small that those
    of rounding to nearest serve.
    """

    units: UnitMap
    quantized: QuantizedModel
    rounded: Bank
    """Rounds to nearest."""

    @property
    def description(self) -> str:
        """The method and grid, and the other bank's."""
        return f"{self.quantized.method} {self.quantized.grid}; other precisions: {self.rounded.description}"

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        """Parameter → value as the model stores it; parameters that stay in 16 bit are left out."""
        own = self.quantized.plan.quantized_precision
        if precision == own:
            return self._solved(unit)
        wanted = self.rounded.weights(unit, precision)
        if bits_of_precision(precision) >= EIGHT:
            return wanted
        here, solved = self.rounded.weights(unit, own), self._solved(unit)
        return {
            name: value if name not in solved else self._scaled(name, solved[name], value, here[name])
            for name, value in wanted.items()
        }

    def _solved(self, unit: str) -> dict[str, Tensor]:
        names = [name.removesuffix(".weight") for name in self.units.parameters[unit]]
        model = self.quantized.loaded.model
        return {
            f"{name}.weight": stored_form(model.get_submodule(name), self.quantized.dense_weight(name))
            for name in names
            if name in self.quantized.tensors
        }

    def _scaled(self, name: str, solved: Tensor, there: Tensor, here: Tensor) -> Tensor:
        """Return weights with the errors of `solved`, as much smaller as those of rounding are `there` than `here`."""
        weight = self.quantized.loaded.model.get_parameter(name).detach()
        size = float((here - weight).norm())
        return weight + (solved - weight) * (float((there - weight).norm()) / size if size else 0.0)
