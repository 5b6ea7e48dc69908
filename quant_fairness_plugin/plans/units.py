"""What a plan can give a precision to: fusion groups, biases and norms of a layer, and what stands around the layers.

Maps the names of units to the parameters of a model; nothing is read or changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_fairness_plugin.artifacts import Grid, Precision, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.architectures.experts import names_experts
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.quantize.grid_rules import unit_grid

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel

EMBEDDINGS, POSITIONS, FINAL_NORM, HEAD = "embeddings", "positions", "final_norm", "head"
BIASES, NORMS = "biases", "norms"
"""Of one layer: `layers.3.biases`. Real checkpoints keep both in 16 bit; a sweep can simulate what that is worth."""
AROUND = (EMBEDDINGS, POSITIONS, BIASES, NORMS, FINAL_NORM, HEAD)
"""What further plans can quantize, by name. `biases` and `norms` are those of all layers at once."""


@dataclass(frozen=True, slots=True)
class UnitMap:
    """The units of a model and their parameters, by full name."""

    parameters: Mapping[str, tuple[str, ...]]
    """Unit → names of its parameters. `layers.3.down`, `layers.3.biases`, `embeddings`, …"""
    stages: tuple[tuple[str, ...], ...]
    """Units in the order in which a forward pass meets them: before the blocks, one entry a block, after them."""
    groups: tuple[str, ...]
    """Names of the fusion groups that some layer has, in forward order; those of one layer: `groups_of`."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.stages) - 2

    def group_names(self) -> tuple[str, ...]:
        """Return the fusion groups of all layers by full name, in forward order."""
        return tuple(str(Unit(layer, group)) for layer in range(self.layers) for group in self.groups_of(layer))

    def groups_of(self, layer: int) -> tuple[str, ...]:
        """Return the names of a layer's fusion groups, in forward order."""
        groups = (Unit.parse(name).group for name in self.stages[layer + 1])
        return tuple(group for group in groups if group in self.groups)

    def expanded(self, precisions: Mapping[str, Precision]) -> dict[str, Precision]:
        """Return the same precisions with whole layers (`layers.3`) replaced by their fusion groups.

        Raises:
            ConfigError: a unit that the model does not have.
        """
        result: dict[str, Precision] = {}
        # Layers first: where a layer and one of its groups are named, the group's precision wins.
        for name, precision in sorted(precisions.items(), key=lambda item: not is_layer(item[0])):
            for unit in self._parts(name):
                if unit not in self.parameters:
                    raise ConfigError(
                        f"the model has no {name!r}; use layers.0 to layers.{self.layers - 1}, one of their parts "
                        f"({', '.join((*self.groups, BIASES, NORMS))}), or "
                        f"{', '.join(other for stage in (self.stages[0], self.stages[-1]) for other in stage)}"
                    )
                result[unit] = precision
        return result

    def _parts(self, name: str) -> tuple[str, ...]:
        """Return what a name stands for: the fusion groups of a whole layer of the model, else the unit itself."""
        layer = Unit.parse(name) if is_layer(name) else None
        if layer is None or layer.layer >= self.layers:
            return (name,)
        return tuple(str(layer.part(group)) for group in self.groups_of(layer.layer))


def is_layer(name: str) -> bool:
    """Return whether a unit is a whole layer."""
    return Unit.is_name(name) and Unit.parse(name).group is None


def map_units(loaded: LoadedModel) -> UnitMap:
    """Return the parameters of every unit of a model."""
    return name_units(loaded.family, loaded.layers, [name for name, _ in loaded.model.named_parameters()])


def name_units(family: Family, layers: int, parameters: Iterable[str]) -> UnitMap:
    """Return the units of a model of which only the names are known.

    Args:
        family: its family map.
        layers: how many layers it has.
        parameters: full names of all its parameters; that of a tied head may be missing.
    """
    inside: dict[str, list[str]] = {f"{family.blocks}.{layer}.": [] for layer in range(layers)}
    outside: list[str] = []
    depth = family.blocks.count(".") + 2
    for name in parameters:
        prefix = ".".join(name.split(".")[:depth]) + "."
        inside.get(prefix, outside).append(name)
    around = _around_layers(family, outside)
    entry = tuple(unit for unit in (EMBEDDINGS, POSITIONS) if unit in around)
    leave = tuple(unit for unit in (FINAL_NORM, HEAD) if unit in around)
    units, blocks = dict(around), []
    for layer, (prefix, names) in enumerate(inside.items()):
        parts = _in_layer(family, Unit(layer), prefix, names)
        units |= parts
        blocks.append(tuple(parts))
    return UnitMap(units, (entry, *blocks, leave), family.unit_names)


def _around_layers(family: Family, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    embeddings = [f"{name}.weight" for name in family.embeddings]
    units = {EMBEDDINGS: tuple(embeddings[:1]), HEAD: (f"{family.head}.weight",)}
    if embeddings[1:]:
        units[POSITIONS] = tuple(embeddings[1:])
    if family.final_norm is not None:
        units[FINAL_NORM] = tuple(name for name in names if name.startswith(f"{family.final_norm}."))
    return units


def _in_layer(family: Family, layer: Unit, prefix: str, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    groups = {
        str(layer.part(group.name)): tuple(f"{prefix}{module}.weight" for module in group.modules)
        for group in family.units_of(layer.layer)
    }
    weights = {name for members in groups.values() for name in members}
    # What always stays in 16 bit belongs to no unit.
    weights |= {f"{module}.weight" for module in family.kept(layer.layer)}
    biases = tuple(name for name in names if name.endswith(".bias"))
    rest = (name for name in names if name not in weights and name not in biases)
    # Routers and gates of shared experts are matrices that every checkpoint keeps in 16 bit.
    norms = tuple(name for name in rest if not names_experts(name.removeprefix(prefix).rpartition(".")[0]))
    vectors = {str(layer.part(kind)): members for kind, members in ((BIASES, biases), (NORMS, norms))}
    return groups | {unit: members for unit, members in vectors.items() if members}


def check_around_names(names: Sequence[str]) -> None:
    """Refuse names of what stands around the layers that no model has.

    Raises:
        ConfigError: an unknown name, or one twice.
    """
    for number, name in enumerate(names):
        if name not in AROUND or name in names[:number]:
            problem = "listed twice" if name in AROUND else "not around the layers"
            raise ConfigError(f"{name!r} is {problem}; use {', '.join(AROUND)}, each once")


def around_units(names: Sequence[str], units: UnitMap) -> dict[str, tuple[str, ...]]:
    """Return the model's units that each name stands for; `biases` are those of every layer.

    Raises:
        ConfigError: an unknown name, one twice, or something that the model does not have.
    """
    check_around_names(names)
    members = {name: _members(name, units) for name in AROUND}
    for name in names:
        if not members[name]:
            existing = ", ".join(other for other in AROUND if members[other])
            raise ConfigError(f"the model has no {name} of its own; use {existing}, or leave it out")
    return {name: members[name] for name in names}


def _members(name: str, units: UnitMap) -> tuple[str, ...]:
    candidates = [str(Unit(layer, name)) for layer in range(units.layers)] if name in (BIASES, NORMS) else [name]
    return tuple(unit for unit in candidates if units.parameters.get(unit))


def check_around(names: Sequence[str], units: UnitMap, shapes: Mapping[str, tuple[int, ...]], grid: Grid) -> None:
    """Refuse what the model does not have, and tables that the grid's groups do not divide.

    Args:
        names: what is to be quantized as well.
        units: the model's units.
        shapes: parameter → shape; that of a tied head may be missing, it is the embeddings'.
        grid: the grid.

    Raises:
        ConfigError: as said.
    """
    for name, members in around_units(names, units).items():
        for parameter in (parameter for unit in members for parameter in units.parameters[unit]):
            tied = units.parameters[EMBEDDINGS][0] if name == HEAD else parameter
            check_table(parameter, shapes.get(parameter, shapes.get(tied, ())), grid, what=name)


def check_table(parameter: str, shape: Sequence[int], grid: Grid, *, what: str) -> None:
    """Refuse a table of tokens or positions whose rows the grid's groups do not divide; vectors have one scale.

    Raises:
        ConfigError: they do not.
    """
    size = unit_grid(grid, shape[1:]).group_size
    if len(shape) == 2 and size != -1 and shape[1] % size:
        raise ConfigError(
            f"{what}: {parameter} has rows of {shape[1]} values, which groups of {size} do not divide; use a group "
            "size that does, or -1"
        )
