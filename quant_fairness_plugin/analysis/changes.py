"""The kinds of changes that `analyze interventions` makes: plans of variants, with the bank that has their weights.

A new kind is a function and an entry of `CHANGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

from quant_fairness_plugin.analysis import variants
from quant_fairness_plugin.analysis.variants import Make, VariantBank, is_attention, writers
from quant_fairness_plugin.artifacts import Grid, Precision, Unit, precision_of_bits
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import BIASES, UnitMap
from quant_fairness_plugin.sweep.bank import Bank, RtnBank, check_bank_fits

BITS = (2, 3, 4, 5, 6, 8)
KEPT = (0.01, 0.05, 0.2)
PRUNED = (0.3, 0.5, 0.7)


@dataclass(frozen=True, slots=True)
class Change:
    """Plans that are scored in one walk."""

    plans: Mapping[str, Mapping[str, Precision]]
    """Name → unit → precision or variant; what is not listed is in 16 bit."""
    bank: Bank


Build = Callable[[LoadedModel, UnitMap, Grid], Iterator[Change]]


def prefix_name(layers: int) -> str:
    """Return the name of the plan that keeps so many layers from the input on in 16 bit."""
    return "all rounded" if not layers else f"16 bit up to layer {layers - 1}"


def bits(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield all layers rounded to 2, 3, 4, 5, 6 and 8 bits."""
    for width in BITS:
        bank = RtnBank(loaded, units, replace(grid, bits=width))
        precision = precision_of_bits(width)
        check_bank_fits(bank, units, precision)
        yield Change({str(precision): dict.fromkeys(units.group_names(), precision)}, bank)


def keep(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield all layers rounded but for the largest 1, 5 and 20 % of the weights."""
    for share in KEPT:
        name = f"largest {share:.0%} kept"
        yield _everywhere(name, variants.keep_largest(loaded, units, grid, share), units.group_names())


def prune(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield all layers without the smallest weights: by magnitude over all layers, matrix by matrix, and 2 of 4."""
    for share in PRUNED:
        name = f"{share:.0%} pruned over all layers"
        yield _everywhere(name, variants.prune_globally(loaded, units, share), units.group_names())
        name = f"{share:.0%} pruned in each matrix"
        yield _everywhere(name, variants.prune_each(loaded, units, share), units.group_names())
    yield _everywhere("2 of 4 kept", variants.prune_n_of_m(loaded, units, 2, 4), units.group_names())


def heads(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield every attention head of every layer, each left out alone."""
    count = int(loaded.model.config.get_text_config().num_attention_heads)
    for layer in range(units.layers):
        output = str(Unit(layer, writers(loaded.family, layer)[0].name))
        plans = {f"without head {layer}.{head}": {output: f"head {head}"} for head in range(count)}
        made = {f"head {head}": variants.without_head(loaded, units, head) for head in range(count)}
        yield Change(_named(plans), VariantBank("heads left out", made))


def drop(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield every layer left out alone: it adds nothing to the hidden state."""
    made = variants.silent(loaded, units)
    plans = {
        f"without layer {layer}": dict.fromkeys(silenced(loaded, units, layer), "silent")
        for layer in range(units.layers)
    }
    yield Change(_named(plans), VariantBank("layers left out", {"silent": made}))


def silenced(loaded: LoadedModel, units: UnitMap, layer: int) -> tuple[str, ...]:
    """Return the units of a layer that hold what it adds to the hidden state."""
    names = [str(Unit(layer, group.name)) for group in writers(loaded.family, layer)]
    biases = str(Unit(layer, BIASES))
    return (*names, biases) if biases in units.parameters else tuple(names)


def prefix(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield 16 bit up to each layer, and all behind it rounded."""
    precision = grid.precision
    bank = RtnBank(loaded, units, grid)
    check_bank_fits(bank, units, precision)
    plans = {
        prefix_name(kept): {str(Unit(layer)): precision for layer in range(kept, units.layers)}
        for kept in range(units.layers)
    }
    yield Change(plans, bank)


def patterns(loaded: LoadedModel, units: UnitMap, grid: Grid) -> Iterator[Change]:
    """Yield attention alone, MLP alone, and every second layer rounded."""
    precision, layers = grid.precision, range(units.layers)
    groups = {layer: loaded.family.units_of(layer) for layer in layers}
    parts = {
        kind: [
            str(Unit(layer, group.name)) for layer in layers for group in groups[layer] if is_attention(group) == own
        ]
        for kind, own in (("attention", True), ("MLP", False))
    }
    parts |= {
        f"{name} layers": [str(Unit(layer)) for layer in layers if layer % 2 == rest]
        for name, rest in (("even", 0), ("odd", 1))
    }
    bank = RtnBank(loaded, units, grid)
    check_bank_fits(bank, units, precision)
    yield Change({f"{name} rounded": dict.fromkeys(members, precision) for name, members in parts.items()}, bank)


CHANGES: dict[str, Build] = {
    "bits": bits,
    "keep": keep,
    "prune": prune,
    "heads": heads,
    "drop": drop,
    "prefix": prefix,
    "patterns": patterns,
}
"""Kind → its plans, as many as are scored together."""


def _everywhere(name: str, make: Make, groups: Iterable[str]) -> Change:
    return Change(_named({name: dict.fromkeys(groups, name)}), VariantBank(name, {name: make}))


def _named(plans: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Precision]]:
    """Variants go where precisions go: the state tree takes both as names."""
    return {name: {unit: cast(Precision, variant) for unit, variant in plan.items()} for name, plan in plans.items()}
