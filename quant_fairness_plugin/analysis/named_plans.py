"""The seeds' configurations as plans at any depth: which layers they keep, in what precision, at which bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quant_fairness_plugin.analysis.variants import is_attention
from quant_fairness_plugin.artifacts import Grid, Precision, Undefined, Unit
from quant_fairness_plugin.evidence.weight_statistics import layer_statistics
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.controls import Control, gateway_layers, random_controls, scored_control
from quant_fairness_plugin.plans.costs import count_bytes, layer_costs, plan_bytes
from quant_fairness_plugin.plans.units import BIASES, EMBEDDINGS, NORMS, POSITIONS, UnitMap, around_units
from quant_fairness_plugin.seeds.rules import scaled_layer

RANDOM_SETS = 3
"""As many as the seeds drew."""
GATEWAYS, NOTHING, ENDS = "first, 3/4, last", "nothing", "first, last"
SIMULATED = Undefined("simulation only: no checkpoint format stores these quantized")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPlan:
    """One configuration: all fusion groups are on the grid but for what it keeps."""

    name: str
    layers: tuple[int, ...] = ()
    """In 16 bit as a whole."""
    overrides: Mapping[str, Precision] = field(default_factory=dict)
    """Other units in other precisions."""
    around: tuple[str, ...] = ()
    """What is quantized beside the fusion groups; simulation only."""

    def precisions(self, units: UnitMap, quantized: Precision) -> dict[str, Precision]:
        """Return the plan as a sweep takes it."""
        plan = dict.fromkeys(units.group_names(), quantized) | units.expanded(self.overrides)
        protected = units.expanded({str(Unit(layer)): "fp16" for layer in self.layers})
        extra = [unit for members in around_units(self.around, units).values() for unit in members]
        rounded = {unit: kind for unit, kind in plan.items() if kind != "fp16" and unit not in protected}
        return rounded | dict.fromkeys(extra, quantized)


def named_plans(loaded: LoadedModel, units: UnitMap, grid: Grid, *, seed: int) -> list[NamedPlan]:
    """Return the configurations for a model. In a shallow one some come to the same set."""
    around = [
        NamedPlan(name=f"nothing, {part} rounded too", around=(part,))
        for part in (EMBEDDINGS, POSITIONS, BIASES, NORMS)
        if _has(part, units)
    ]
    return [*_layer_sets(loaded.layers), *_unit_sets(loaded, grid), *_at_equal_bytes(loaded, grid, seed), *around]


def bytes_of(plans: Sequence[NamedPlan], loaded: LoadedModel, grid: Grid) -> tuple[list[int | Undefined], int]:
    """Return the bytes of the checkpoint under every plan, and those in 16 bit."""
    table, other = count_bytes(loaded, grid)
    quantized = grid.precision
    sizes = [
        SIMULATED if plan.around else plan_bytes(table, other, plan.layers, plan.overrides, quantized=quantized)
        for plan in plans
    ]
    return sizes, plan_bytes(table, other, range(loaded.layers))


def _layer_sets(layers: int) -> Iterator[NamedPlan]:
    last, deep = layers - 1, gateway_layers(layers)[-2:][0]
    for name, members in (
        (NOTHING, ()),
        ("first", (0,)),
        ("last", (last,)),
        (ENDS, (0, last)),
        (GATEWAYS, gateway_layers(layers)),
        ("first, 3/4 and the one before, last", (0, deep - 1, deep, last)),
        ("third, last", (scaled_layer(2, layers), last)),
        ("4, 6, 11 of 12", tuple(scaled_layer(layer, layers) for layer in (4, 6, 11))),
        ("even layers", range(0, layers, 2)),
        ("odd layers", range(1, layers, 2)),
    ):
        yield NamedPlan(name=name, layers=tuple(sorted({layer for layer in members if layer >= 0})))


def _unit_sets(loaded: LoadedModel, grid: Grid) -> Iterator[NamedPlan]:
    for name, attention in (("attention", True), ("MLP", False)):
        kept = [
            str(Unit(layer, group.name))
            for layer in range(loaded.layers)
            for group in loaded.family.units_of(layer)
            if is_attention(group) == attention
        ]
        yield NamedPlan(name=name, overrides=dict.fromkeys(kept, "fp16"))
    if grid.bits < 8:
        layers = [str(Unit(layer)) for layer in gateway_layers(loaded.layers)]
        yield NamedPlan(name=f"{GATEWAYS} in INT8", overrides=dict.fromkeys(layers, "int8"))


def _at_equal_bytes(loaded: LoadedModel, grid: Grid, seed: int) -> Iterator[NamedPlan]:
    """Yield sets of layers at the bytes of the first and last: random ones, and those that weights would choose."""
    costs = layer_costs(loaded, grid)
    ends: dict[str, Precision] = {str(Unit(0)): "fp16", str(Unit(loaded.layers - 1)): "fp16"}
    target = costs.total(ends)
    for number, control in enumerate(random_controls(costs, target, count=RANDOM_SETS, seed=seed, exclude=ends)):
        yield _of_control(f"random layers {number}", control)
    statistics = [
        layer_statistics(linear_weight(module) for module in loaded.linears(layer).values())
        for layer in range(loaded.layers)
    ]
    for name in ("magnitude", "variance"):
        values = [getattr(layer, name) for layer in statistics]
        yield _of_control(f"largest {name}", scored_control(name, values, costs, target))


def _of_control(name: str, control: Control) -> NamedPlan:
    kept = [unit for unit, kind in control.precisions.items() if kind == "fp16"]
    return NamedPlan(name=name, layers=tuple(sorted(Unit.parse(unit).layer for unit in kept)))


def _has(around: str, units: UnitMap) -> bool:
    return any(name == around or name.endswith(f".{around}") for name in units.parameters)
