"""Which linear modules a plan quantizes, and which stay in 16 bit although their layer is quantized.

Takes a loaded model, the protected layers and a grid; returns a `Selection`, before any tensor is touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from quant_fairness_plugin.artifacts import Grid, Precision, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.quantize.grid_rules import check_grid, misfit, unit_grid

NO_OVERRIDES: Mapping[str, Precision] = MappingProxyType({})


class Modules(Protocol):
    """What plans need to know of a model: a `LoadedModel`, or an `Outline`, which has no weights."""

    @property
    def layers(self) -> int:
        """How many decoder blocks there are."""

    @property
    def family(self) -> Family:
        """The family map."""

    @property
    def parameters(self) -> int:
        """How many numbers the model holds; tied ones count once."""

    def matrix(self, module: str) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of a linear module, by its full name."""

    def table_shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the embedding, and of a head of its own."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules to quantize, by full name."""

    units: dict[int, tuple[tuple[str, ...], ...]]
    """Per quantized layer its fusion groups in forward order; the modules of one share their inputs."""
    kept: dict[str, str]
    """Module of a quantized layer that stays in 16 bit → reason."""
    protected: tuple[int, ...]
    """Layers that are wholly in 16 bit."""
    grids: dict[str, Grid]
    """Module to quantize → its grid: the plan's, with the group size and the bits of its fusion group."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of all modules to quantize, in forward order."""
        return tuple(name for units in self.units.values() for unit in units for name in unit)


def group_sizes(model: Modules, grid: Grid, *, protected: Collection[int] = ()) -> dict[str, int]:
    """Return the group size of every fusion group that a grid fits, by its name (`layers.3.down`), in forward order.

    Args:
        model: the model, or its outline.
        grid: its group size is the largest that any of them takes.
        protected: layers that are left out.
    """
    sizes: dict[str, int] = {}
    for layer in range(model.layers):
        for unit in () if layer in protected else model.family.units_of(layer):
            shapes = [model.matrix(f"{model.family.blocks}.{layer}.{name}") for name in unit.modules]
            own = unit_grid(grid, (cols for _, cols in shapes))
            if all(misfit(own, *shape) is None for shape in shapes):
                sizes[str(Unit(layer, unit.name))] = own.group_size
    return sizes


def fitting_group_size(model: Modules, largest: int, *, uniform: bool) -> int | None:
    """Return the largest group size that a fusion group of a model takes; None where no size fits any of them.

    Args:
        model: the model, or its outline.
        largest: the largest size to take.
        uniform: one size for the whole model, as some formats and readers want it: the largest that fits all that
            have one at all.
    """
    sizes = group_sizes(model, Grid(group_size=largest)).values()
    return (min if uniform else max)(sizes, default=None)


def usual_group_size(model: Modules, largest: int) -> int | None:
    """Return the group size that most weights of a model take, each the largest that fits; None where none fits any.

    Args:
        model: the model, or its outline.
        largest: the largest size to take.
    """
    weights: Counter[int] = Counter()
    for name, size in group_sizes(model, Grid(group_size=largest)).items():
        unit = Unit.parse(name)
        modules = next(group.modules for group in model.family.units_of(unit.layer) if group.name == unit.group)
        shapes = [model.matrix(f"{model.family.blocks}.{unit.layer}.{module}") for module in modules]
        weights[size] += sum(rows * cols for rows, cols in shapes)
    return max(weights, key=lambda size: (weights[size], size), default=None)


def select_modules(
    loaded: Modules,
    grid: Grid,
    *,
    protected: Collection[int] = (),
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
) -> Selection:
    """Return the modules that a grid fits in all layers but the protected ones.

    A fusion group is quantized as a whole or not at all: servers merge it into one matrix of one precision. It takes
    the largest group size, up to the grid's, that divides the input channels of all its modules.

    Args:
        loaded: the model.
        grid: the grid of everything that is not singled out, with the largest group size.
        protected: layers that stay in 16 bit.
        overrides: other precisions, of a layer (`layers.5`) or one of its fusion groups (`layers.3.down`), as in
            `ProtectionPlan.overrides`.

    Raises:
        ConfigError: the grid is not a grid or fits no module, or an override names no unit of the model.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
    """
    check_grid(grid)
    checked = check_layers(list(protected), loaded.layers) if protected else ()
    precisions = _parse_overrides(loaded, overrides)
    units: dict[int, tuple[tuple[str, ...], ...]] = {}
    in_16_bit: dict[str, str] = {}
    grids: dict[str, Grid] = {}
    for layer in range(loaded.layers):
        if layer in checked:
            continue
        fitting, misfits = _select_units(loaded, layer, _group_grids(loaded, Unit(layer), grid, precisions))
        units[layer] = tuple(names for names, _ in fitting)
        grids |= {name: group_grid for names, group_grid in fitting for name in names}
        in_16_bit |= misfits
    if not any(units.values()):
        name, reason = next(iter(in_16_bit.items()), ("all units", "in 16 bit by the plan"))
        raise ConfigError(f"{grid} fits no module of the model: {name}: {reason}; use another group size, or -1")
    return Selection(units=units, kept=in_16_bit, protected=checked, grids=grids)


def _group_grids(loaded: Modules, layer: Unit, grid: Grid, precisions: Mapping[Unit, Precision]) -> dict[str, Grid]:
    """Return the grids of a layer's fusion groups; those in 16 bit by the plan are left out."""
    groups = loaded.family.units_of(layer.layer)
    kinds = {group.name: precisions.get(layer.part(group.name), precisions.get(layer)) for group in groups}
    return {name: grid if kind is None else grid.at(kind) for name, kind in kinds.items() if kind != "fp16"}


def _parse_overrides(loaded: Modules, overrides: Mapping[str, Precision]) -> dict[Unit, Precision]:
    result: dict[Unit, Precision] = {}
    for name, precision in overrides.items():
        unit = Unit.parse(name) if Unit.is_name(name) else None
        layer = unit.layer if unit is not None and unit.layer < loaded.layers else 0
        names = tuple(group.name for group in loaded.family.units_of(layer))
        if unit is None or unit.layer >= loaded.layers or unit.group not in (None, *names):
            raise ConfigError(
                f"the model has no {name!r}; layers are 0..{loaded.layers - 1}, the units of layer {layer} "
                f"{', '.join(names)}. Write layers.{layer} or layers.{layer}.{names[-1]}"
            )
        result[unit] = precision
    return result


def _select_units(
    loaded: Modules, layer: int, grids: Mapping[str, Grid]
) -> tuple[list[tuple[tuple[str, ...], Grid]], dict[str, str]]:
    """Return the fusion groups of a layer that have a grid and fit it, and what does not fit."""
    fitting: list[tuple[tuple[str, ...], Grid]] = []
    in_16_bit = loaded.family.kept(layer)
    for unit in loaded.family.units_of(layer):
        if unit.name not in grids:
            continue
        names = tuple(f"{loaded.family.blocks}.{layer}.{name}" for name in unit.modules)
        shapes = {name: loaded.matrix(name) for name in names}
        grid = unit_grid(grids[unit.name], (cols for _, cols in shapes.values()))
        reasons = {name: misfit(grid, *shape) for name, shape in shapes.items()}
        misfits = {name: reason for name, reason in reasons.items() if reason is not None}
        if not misfits:
            fitting.append((names, grid))
            continue
        first = next(iter(misfits))
        in_16_bit |= {
            name: misfits.get(name, f"shares a fusion group with {first}: {misfits[first]}") for name in names
        }
    return fitting, in_16_bit
