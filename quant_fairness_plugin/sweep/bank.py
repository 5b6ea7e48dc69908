"""The weights of a unit at a precision. Step 4 (sweep): the engine asks, and does not care how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision, bits_of_precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.quantize.grid_rules import misfit
from quant_fairness_plugin.sweep.units import UnitMap


class Bank(Protocol):
    """Where quantized weights come from."""

    @property
    def description(self) -> str:
        """Which grid or checkpoint this is; part of a report and of every result's key."""

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        """Parameter → value as the model stores it. Parameters that stay in 16 bit are left out."""


class RtnBank:
    """Rounds to nearest when a unit is first asked for, and keeps the result.

    A unit that the grid does not fit in one of its matrices stays in 16 bit as a whole, as in a checkpoint. Vectors
    (biases, norms), which no checkpoint format quantizes, get one scale for all their values.
    """

    def __init__(self, loaded: LoadedModel, units: UnitMap, grid: Grid, *, keep: bool = True) -> None:
        self._loaded, self._units, self._grid, self._keep = loaded, units, grid, keep
        self._made: dict[tuple[str, Precision], dict[str, Tensor]] = {}
        self._transposed = {f"{name}.weight" for name, module in loaded.model.named_modules() if is_conv1d(module)}

    @property
    def description(self) -> str:
        """The grid; bits come from the plans."""
        return f"rtn {self._grid}"

    def recipe(self) -> partial[RtnBank]:
        """Makes the same bank for a copy of the model, in another process."""
        return partial(RtnBank, grid=self._grid, keep=self._keep)

    def weights(self, unit: str, precision: Precision) -> dict[str, Tensor]:
        """Parameter → rounded value as the model stores it."""
        key = (unit, precision)
        if key not in self._made:
            grid = replace(self._grid, bits=bits_of_precision(precision))
            rounded = {name: self._round(name, grid) for name in self._units.parameters[unit]}
            made = {name: value for name, value in rounded.items() if value is not None}
            # Servers merge a fusion group into one matrix, which has one precision.
            made = made if len(made) == len(rounded) else {}
            if not self._keep:
                return made
            self._made[key] = made
        return self._made[key]

    def _round(self, name: str, grid: Grid) -> Tensor | None:
        value = self._loaded.model.get_parameter(name).detach()
        transposed = name in self._transposed
        matrix = value.t() if transposed else value if value.dim() == 2 else value[None]
        own = grid if value.dim() == 2 else replace(grid, group_size=-1)
        if value.dim() == 2 and misfit(own, *matrix.shape) is not None:
            return None
        rounded = quantize_rtn(matrix, own, scale_dtype=self._loaded.storage_dtype).dequantize().to(value)
        return (rounded.t().contiguous() if transposed else rounded).view(value.shape)


def check_bank_fits(bank: Bank, units: UnitMap, precision: Precision) -> None:
    """Refuse a bank that quantizes no unit of any layer.

    Raises:
        ConfigError: every weight would stay in 16 bit.
    """
    if not any(bank.weights(f"layers.0.{group}", precision) for group in units.groups):
        raise ConfigError(f"{bank.description} fits no module of the model; use another group size, or -1")
