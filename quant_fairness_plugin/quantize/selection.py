"""Which linear modules a plan quantizes, and which stay in 16 bit although their layer is quantized. Step 6 (quantize).

Takes a loaded model, the protected layers and a grid; returns a `Selection`, before any tensor is touched.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.grid_rules import check_grid, misfit


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules to quantize, by full name."""

    units: dict[int, tuple[tuple[str, ...], ...]]
    """Per quantized layer its fusion groups in forward order; the modules of one share their inputs."""
    kept: dict[str, str]
    """Module of a quantized layer that stays in 16 bit → reason."""
    protected: tuple[int, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of all modules to quantize, in forward order."""
        return tuple(name for units in self.units.values() for unit in units for name in unit)


def select_modules(loaded: LoadedModel, grid: Grid, *, protected: Collection[int] = ()) -> Selection:
    """The modules that a grid fits in all layers but the protected ones.

    A fusion group is quantized as a whole or not at all: servers merge it into one matrix of one precision.

    Raises:
        ConfigError: the grid is not a grid, or fits no module.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
    """
    check_grid(grid)
    checked = check_layers(list(protected), loaded.layers) if protected else ()
    units: dict[int, tuple[tuple[str, ...], ...]] = {}
    kept: dict[str, str] = {}
    for layer in range(loaded.layers):
        if layer in checked:
            continue
        fitting, misfits = _select_units(loaded, layer, grid)
        units[layer] = fitting
        kept |= misfits
    if not any(units.values()):
        name, reason = next(iter(kept.items()))
        raise ConfigError(f"{grid} fits no module of the model: {name}: {reason}; use another group size, or -1")
    return Selection(units=units, kept=kept, protected=checked)


def _select_units(loaded: LoadedModel, layer: int, grid: Grid) -> tuple[tuple[tuple[str, ...], ...], dict[str, str]]:
    modules = loaded.linears(layer)
    fitting: list[tuple[str, ...]] = []
    kept: dict[str, str] = {}
    for unit in loaded.family.units:
        names = tuple(f"{loaded.family.blocks}.{layer}.{name}" for name in unit.modules)
        reasons = {name: misfit(grid, *linear_weight(modules[name]).shape) for name in names}
        found = {name: reason for name, reason in reasons.items() if reason is not None}
        if not found:
            fitting.append(names)
            continue
        first = next(iter(found))
        kept |= {name: found.get(name, f"shares a fusion group with {first}: {found[first]}") for name in names}
    return tuple(fitting), kept
