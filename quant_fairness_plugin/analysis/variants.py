"""Other weights than rounded ones, served to a state tree like any precision: pruned, partly kept, without a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Unit
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.architectures import FusionGroup
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import BIASES, UnitMap
from quant_fairness_plugin.sweep.bank import RtnBank

Make = Callable[[str], dict[str, Tensor]]
"""Unit → parameter → value as the model stores it."""
SAMPLE = 1 << 24
"""Weights that a limit over all layers is read off; evenly spread where there are more."""


@dataclass(slots=True)
class VariantBank:
    """Weights of units in named variants, which stand where a plan has precisions; each is made once and kept."""

    description: str
    variants: Mapping[str, Make]
    _made: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)

    def weights(self, unit: str, precision: str) -> dict[str, Tensor]:
        """Parameter → value in a variant.

        Raises:
            ConfigError: a variant that this bank does not have.
        """
        if precision not in self.variants:
            raise ConfigError(f"there is no variant {precision!r}; there are {', '.join(self.variants)}")
        key = (unit, precision)
        if key not in self._made:
            self._made[key] = self.variants[precision](unit)
        return self._made[key]


def is_attention(group: FusionGroup) -> bool:
    """Return whether a fusion group belongs to attention, by the name of its module."""
    return any("attn" in module or "attention" in module for module in group.modules)


def writers(family: Family, layer: int) -> tuple[FusionGroup, FusionGroup]:
    """Return the fusion groups whose outputs attention and MLP add to the hidden state: the last of each.

    Raises:
        UnsupportedModelError: the block has no attention or no MLP by the names of its modules.
    """
    groups = family.units_of(layer)
    attention = [group for group in groups if is_attention(group)]
    others = [group for group in groups if not is_attention(group)]
    if not attention or not others:
        raise UnsupportedModelError(
            f"{family.name}: layer {layer} does not name its attention and MLP; expected modules under 'attn' or "
            "'attention', and others. Use the kinds bits, keep, prune or prefix"
        )
    return attention[-1], others[-1]


def keep_largest(loaded: LoadedModel, units: UnitMap, grid: Grid, share: float) -> Make:
    """Return the variant that rounds all weights to nearest but the largest, by magnitude over all layers."""
    limit, bank = magnitude_limit(loaded, units, 1 - share), RtnBank(loaded, units, grid, keep=False)
    precision = grid.precision

    def make(unit: str) -> dict[str, Tensor]:
        rounded = bank.weights(unit, precision)
        originals = {name: loaded.model.get_parameter(name).detach() for name in rounded}
        return {name: torch.where(value.abs() >= limit, value, rounded[name]) for name, value in originals.items()}

    return make


def prune_globally(loaded: LoadedModel, units: UnitMap, share: float) -> Make:
    """Return the variant without the smallest weights, by magnitude over all layers."""
    return _masked(loaded, units, magnitude_limit(loaded, units, share))


def prune_each(loaded: LoadedModel, units: UnitMap, share: float) -> Make:
    """Return the variant in which every matrix loses the same share of its weights, the smallest."""
    return _masked(loaded, units, None, share)


def prune_n_of_m(loaded: LoadedModel, units: UnitMap, kept: int, group: int) -> Make:
    """Return the variant that keeps the largest `kept` of every `group` weights along the inputs, as GPUs read them.

    Raises:
        UnsupportedModelError: a matrix whose inputs the group does not divide.
    """

    def prune(matrix: Tensor) -> Tensor:
        if matrix.shape[-1] % group:
            raise UnsupportedModelError(
                f"a matrix of {matrix.shape[-1]} inputs, which groups of {group} do not divide; leave out --kind prune"
            )
        groups = matrix.reshape(len(matrix), -1, group)
        least = groups.abs().argsort(dim=-1)[..., : group - kept]
        return groups.scatter(-1, least, 0.0).reshape(matrix.shape)

    return _each_matrix(loaded, units, prune)


def without_head(loaded: LoadedModel, units: UnitMap, head: int) -> Make:
    """Return the variant in which attention's output module does not read one head."""
    heads = int(loaded.model.config.get_text_config().num_attention_heads)

    def zero(matrix: Tensor) -> Tensor:
        width = matrix.shape[1] // heads
        inputs = torch.arange(matrix.shape[1], device=matrix.device) // width
        return torch.where(inputs == head, 0.0, matrix)

    return _each_matrix(loaded, units, zero)


def silent(loaded: LoadedModel, units: UnitMap) -> Make:
    """Return the variant that adds nothing to the hidden state: writers and their biases are zero."""

    def make(unit: str) -> dict[str, Tensor]:
        parsed = Unit.parse(unit)
        modules = [module for group in writers(loaded.family, parsed.layer) for module in group.modules]
        biases = {f"{loaded.family.blocks}.{parsed.layer}.{module}.bias" for module in modules}
        names = units.parameters[unit]
        return {
            name: torch.zeros_like(loaded.model.get_parameter(name))
            for name in names
            if parsed.group != BIASES or name in biases
        }

    return make


def magnitude_limit(loaded: LoadedModel, units: UnitMap, share: float) -> float:
    """Return the magnitude below which so large a share of all layers' weights lies."""
    names = [name for unit in units.group_names() for name in units.parameters[unit]]
    step = max(1, sum(loaded.model.get_parameter(name).numel() for name in names) // SAMPLE)
    sizes = torch.cat([loaded.model.get_parameter(name).detach().flatten()[::step].abs() for name in names])
    position = min(len(sizes) - 1, round(share * len(sizes)))
    return float(sizes.kthvalue(position + 1).values)


def _masked(loaded: LoadedModel, units: UnitMap, limit: float | None, share: float = 0.0) -> Make:
    def prune(matrix: Tensor) -> Tensor:
        sizes = matrix.abs()
        least = round(share * matrix.numel())
        low = sizes.flatten().kthvalue(least + 1).values if limit is None else limit
        return torch.where(sizes < low, 0.0, matrix)

    return _each_matrix(loaded, units, prune)


def _each_matrix(loaded: LoadedModel, units: UnitMap, change: Callable[[Tensor], Tensor]) -> Make:
    """`change` takes and returns `[out_features, in_features]`, of stacked experts `[experts, out, in]`."""

    def make(unit: str) -> dict[str, Tensor]:
        return dict(_changed(unit))

    def _changed(unit: str) -> Iterator[tuple[str, Tensor]]:
        for name in units.parameters[unit]:
            stored = loaded.model.get_parameter(name).detach()
            turned = stored.t() if loaded.family.conv1d else stored
            changed = change(turned)
            yield name, changed.t().contiguous() if loaded.family.conv1d else changed

    return make
