"""What a sweep can give a precision to: fusion groups, biases and norms of a layer, and what stands around the layers.

Step 4 (sweep). Maps unit names to the parameters of a model; nothing is read or changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.families import Family

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel

EMBEDDINGS, POSITIONS, FINAL_NORM, HEAD = "embeddings", "positions", "final_norm", "head"
BIASES, NORMS = "biases", "norms"
"""Of one layer: `layers.3.biases`. Real checkpoints keep both in 16 bit; a sweep can simulate what that is worth."""


@dataclass(frozen=True, slots=True)
class UnitMap:
    """The units of a model and their parameters, by full name."""

    parameters: Mapping[str, tuple[str, ...]]
    """Unit → names of its parameters. `layers.3.down`, `layers.3.biases`, `embeddings`, …"""
    stages: tuple[tuple[str, ...], ...]
    """Units in the order in which a forward pass meets them: before the blocks, one entry a block, after them."""
    groups: tuple[str, ...]
    """Fusion groups of a layer, in forward order."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.stages) - 2

    def expanded(self, precisions: Mapping[str, Precision]) -> dict[str, Precision]:
        """The same choice with whole layers (`layers.3`) spelled out as their fusion groups; single units win.

        Raises:
            ConfigError: a unit that the model does not have.
        """
        found: dict[str, Precision] = {}
        for unit, precision in sorted(precisions.items(), key=lambda item: item[0].count(".")):
            whole = unit.count(".") == 1 and unit.startswith("layers.")
            for name in (f"{unit}.{group}" for group in self.groups) if whole else (unit,):
                if name not in self.parameters:
                    raise ConfigError(
                        f"{unit!r} is no unit of the model; use layers.0 to layers.{self.layers - 1}, one of their "
                        f"parts ({', '.join((*self.groups, BIASES, NORMS))}), or "
                        f"{', '.join(unit for stage in (self.stages[0], self.stages[-1]) for unit in stage)}"
                    )
                found[name] = precision
        return found


def map_units(loaded: LoadedModel) -> UnitMap:
    """Find the parameters of every unit of a model."""
    return name_units(loaded.family, loaded.layers, [name for name, _ in loaded.model.named_parameters()])


def name_units(family: Family, layers: int, parameters: Iterable[str]) -> UnitMap:
    """The units of a model of which only the names are known.

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
    around = _around(family, outside)
    entry = tuple(unit for unit in (EMBEDDINGS, POSITIONS) if unit in around)
    leave = tuple(unit for unit in (FINAL_NORM, HEAD) if unit in around)
    found, blocks = dict(around), []
    for layer, (prefix, names) in enumerate(inside.items()):
        own = _of_layer(family, layer, prefix, names)
        found |= own
        blocks.append(tuple(own))
    return UnitMap(found, (entry, *blocks, leave), tuple(unit.name for unit in family.units))


def _around(family: Family, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    embeddings = [f"{name}.weight" for name in family.embeddings]
    found = {EMBEDDINGS: tuple(embeddings[:1]), HEAD: (f"{family.head}.weight",)}
    if embeddings[1:]:
        found[POSITIONS] = tuple(embeddings[1:])
    if family.final_norm is not None:
        found[FINAL_NORM] = tuple(name for name in names if name.startswith(f"{family.final_norm}."))
    return found


def _of_layer(family: Family, layer: int, prefix: str, others: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = {
        f"layers.{layer}.{unit.name}": tuple(f"{prefix}{module}.weight" for module in unit.modules)
        for unit in family.units
    }
    weights = {name for names in found.values() for name in names}
    biases = tuple(name for name in others if name.endswith(".bias"))
    norms = tuple(name for name in others if name not in weights and name not in biases)
    return found | {f"layers.{layer}.{kind}": names for kind, names in ((BIASES, biases), (NORMS, norms)) if names}
