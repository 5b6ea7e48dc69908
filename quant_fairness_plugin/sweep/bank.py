"""The weights of a unit at a precision: rounded to nearest, from a checkpoint, or those of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.plans.tree import Variant
from quant_fairness_plugin.plans.units import UnitMap, check_table
from quant_fairness_plugin.quantize.grid import quantize_rtn, shared_largest
from quant_fairness_plugin.quantize.grid_rules import misfit, unit_grid
from quant_fairness_plugin.quantize.schemes import find_scheme


class Bank(Protocol):
    """Where quantized weights come from."""

    @property
    def description(self) -> str:
        """Which grid or checkpoint this is; part of a report and of every result's key."""

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        """Parameter → value as the model stores it. Parameters that stay in 16 bit are left out."""


def variant_weights(bank: Bank, variant: Variant) -> dict[str, Tensor]:
    """Return the parameters of all units of a variant: full name → value as the model stores it."""
    return {name: value for unit, precision in variant for name, value in bank.weights(unit, precision).items()}


class RtnBank:
    """Rounds a unit to nearest when its weights are first needed, and keeps the result.

    A unit takes the largest group size, up to the grid's, that fits all its matrices; a fusion group that none fits
    stays in 16 bit as a whole, as in a checkpoint.
    What no checkpoint format quantizes is simulation only: vectors (biases, norms) get one scale for all their values,
    and tables (embeddings, positions, head) are rounded in groups along their rows, whatever their number of rows.
    """

    def __init__(self, loaded: LoadedModel, units: UnitMap, grid: Grid, *, keep: bool = True) -> None:
        self._loaded, self._units, self._grid, self._keep = loaded, units, grid, keep
        self._made: dict[tuple[str, Precision], dict[str, Tensor]] = {}
        self._packed = {name for unit in units.group_names() for name in units.parameters[unit]}
        self._transposed = {f"{name}.weight" for name, module in loaded.model.named_modules() if is_conv1d(module)}

    @property
    def description(self) -> str:
        """The grid; bits come from the plans."""
        return f"rtn {self._grid}"

    def recipe(self) -> partial[RtnBank]:
        """Return what makes the same bank for a copy of the model, in another process."""
        return partial(RtnBank, grid=self._grid, keep=self._keep)

    def weights(self, unit: str, precision: Precision) -> dict[str, Tensor]:
        """Parameter → rounded value as the model stores it."""
        key = (unit, precision)
        if key not in self._made:
            grid = self._grid_of(unit, precision)
            largest = shared_largest(map(self._matrix, self._units.parameters[unit]), grid)
            rounded = {name: self._round(name, grid, largest) for name in self._units.parameters[unit]}
            made = {name: value for name, value in rounded.items() if value is not None}
            # Servers merge a fusion group into one matrix, which has one precision.
            made = made if len(made) == len(rounded) else {}
            if not self._keep:
                return made
            self._made[key] = made
        return self._made[key]

    def quantizes(self, unit: str, precision: Precision) -> bool:
        """Return whether the grid fits a fusion group, judged by shapes alone: nothing is rounded."""
        grid, names = self._grid_of(unit, precision), self._units.parameters[unit]
        return all(misfit(grid, *self._matrix(name).shape) is None for name in names)

    def _grid_of(self, unit: str, precision: Precision) -> Grid:
        grid = self._grid.at(precision)
        shapes = [self._matrix(name).shape for name in self._units.parameters[unit]]
        return unit_grid(grid, [shape[1] for shape in shapes if len(shape) == 2])  # a vector has one scale

    def _matrix(self, name: str) -> Tensor:
        value = self._loaded.model.get_parameter(name).detach()
        return value.t() if name in self._transposed else value

    def _round(self, name: str, grid: Grid, largest: float | None) -> Tensor | None:
        value = self._loaded.model.get_parameter(name).detach()
        transposed = name in self._transposed
        matrix = self._matrix(name) if value.dim() == 2 else value[None]
        if name not in self._packed and find_scheme(grid) is not None:
            raise ConfigError(
                f"{self.description}: {name} is no matrix of a layer, and others are simulated on integers alone; "
                "leave --also out, or the scheme"
            )
        if value.dim() != 2:
            grid = replace(grid, group_size=-1)
        elif name not in self._packed:
            check_table(name, matrix.shape, grid, what=self.description)
        elif misfit(grid, *matrix.shape) is not None:
            return None
        coded = quantize_rtn(matrix, grid, scale_dtype=self._loaded.storage_dtype, largest=largest)
        rounded = coded.dequantize().to(value)
        return (rounded.t().contiguous() if transposed else rounded).view(value.shape)


class CheckpointBank:
    """The weights of a quantized checkpoint, dequantized when a unit's are first needed, and then in memory.

    What the checkpoint holds in 16 bit stays in 16 bit in every plan. It was quantized as a whole, so its blocks saw
    quantized inputs: exchanged one by one they are an approximation of what quantizing one by one would give.
    """

    def __init__(
        self,
        units: UnitMap,
        *,
        precision: Precision,
        quantized: Mapping[str, Callable[[], Tensor]],
        folded: Mapping[str, Callable[[], Tensor]],
        description: str,
        recipe: Callable[..., Any],
    ) -> None:
        """Nothing is read yet.

        Args:
            units: the model's units.
            precision: what all of its quantized weights have.
            quantized: parameter → reads its dequantized value as the model stores it.
            folded: 16-bit parameter of a block that has another value in the checkpoint (AWQ) → reads that.
            description: which checkpoint, with its checksum.
            recipe: makes the same bank in another process.
        """
        self._units, self._quantized, self._folded = units, quantized, folded
        self._precision, self._description, self._recipe = precision, description, recipe
        self._made: dict[str, dict[str, Tensor]] = {}
        self._carried = self._carriers()

    @property
    def description(self) -> str:
        """The checkpoint's kind and checksum, and what it holds in 16 bit."""
        return self._description

    @property
    def folds(self) -> bool:
        """Whether scales were moved between modules, so that a layer can only be exchanged as a whole."""
        return bool(self._folded)

    def recipe(self) -> Callable[..., Any]:
        """Makes the same bank for a copy of the model, in another process."""
        return self._recipe

    def quantizes(self, unit: str) -> bool:
        """Return whether any weight of a unit is quantized in the checkpoint."""
        return any(name in self._quantized for name in self._units.parameters[unit])

    def weights(self, unit: str, precision: Precision) -> dict[str, Tensor]:
        """Parameter → value from the checkpoint.

        Raises:
            ConfigError: a precision that it does not hold.
        """
        if precision != self._precision:
            raise ConfigError(
                f"the bank ({self._description}) holds {self._precision} weights, and {unit} is to be in {precision}; "
                f"sweep in {self._precision}, or without --bank"
            )
        if unit not in self._made:
            names = [name for name in self._units.parameters[unit] if name in self._quantized]
            readers = {name: self._quantized[name] for name in names} | self._carried.get(unit, {})
            self._made[unit] = {name: read() for name, read in readers.items()}
        return self._made[unit]

    def _carriers(self) -> dict[str, dict[str, Callable[[], Tensor]]]:
        """The first quantized unit of each layer carries all that is folded there; its units go together."""
        carried: dict[str, dict[str, Callable[[], Tensor]]] = {}
        for layer in range(self._units.layers):
            names = {name for unit in self._units.stages[layer + 1] for name in self._units.parameters[unit]}
            first = next((u for g in self._units.groups_of(layer) if self.quantizes(u := str(Unit(layer, g)))), None)
            if first is not None:
                carried[first] = {name: read for name, read in self._folded.items() if name in names}
        return carried


@dataclass(frozen=True, slots=True)
class BlockBank:
    """Keeps what another bank makes until it is forgotten: the weights of one block, in a layer-by-layer sweep."""

    loaded: LoadedModel
    units: UnitMap
    bank: Bank
    _made: dict[tuple[str, Precision], Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """That of the other bank."""
        return self.bank.description

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        """Parameter → value as the model stores it."""
        key = (unit, precision)
        if key not in self._made:
            with self._tables_in_memory(self.units.parameters[unit]):
                self._made[key] = self.bank.weights(unit, precision)
        return self._made[key]

    def forget(self) -> None:
        """Free all of it."""
        self._made.clear()

    def _tables_in_memory(self, names: tuple[str, ...]) -> AbstractContextManager[None]:
        return self.loaded.widened(names) if isinstance(self.loaded, StreamedModel) else nullcontext()


def fitting_units(bank: Bank, units: UnitMap, precision: Precision) -> tuple[str, ...]:
    """Return the fusion groups of all layers that a bank quantizes, in forward order.

    Raises:
        ConfigError: its scales are folded across units, so that these cannot be exchanged one by one.
    """
    if isinstance(bank, CheckpointBank):
        if bank.folds:
            raise ConfigError(
                f"the bank ({bank.description}) holds scales that were folded from one unit of a layer into another "
                "(AWQ), so that only whole layers can be exchanged; use granularity 'layer'"
            )
        return tuple(name for name in units.group_names() if bank.quantizes(name))
    return tuple(name for name in units.group_names() if _quantizes(bank, name, precision))


def _quantizes(bank: Bank, unit: str, precision: Precision) -> bool:
    return bank.quantizes(unit, precision) if isinstance(bank, RtnBank) else bool(bank.weights(unit, precision))


def check_bank_fits(bank: Bank, units: UnitMap, precision: Precision) -> None:
    """Refuse a bank that quantizes no unit of any layer.

    Raises:
        ConfigError: every weight would stay in 16 bit.
    """
    if isinstance(bank, CheckpointBank):
        return  # a checkpoint without a quantized module is no bank
    if not any(_quantizes(bank, name, precision) for name in units.group_names()):
        raise ConfigError(f"{bank.description} fits no module of the model; use another group size, or -1")
