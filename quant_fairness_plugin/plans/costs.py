"""What a plan costs in bytes: of a matrix, a unit, a layer, a checkpoint; and its 16-bit channels. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from quant_fairness_plugin.artifacts import Grid, Precision, ProtectionPlan, bits_of_precision, precision_of_bits
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.grid_rules import column_bytes, group_count, has_columns, misfit
from quant_fairness_plugin.quantize.selection import Modules, Selection, select_modules

WIDER: tuple[Precision, ...] = ("int3", "int4", "int5", "int8")
"""More bits for everything: what the bytes of a protected layer could buy instead, where the grid has fewer."""


def layer_costs(loaded: Modules, grid: Grid) -> Costs:
    """Bytes of every whole layer on the grid, with more bits, and in 16 bit."""
    wider = tuple(kind for kind in WIDER if bits_of_precision(kind) > grid.bits)
    sizes, other = count_bytes(loaded, grid, wider)
    rows: dict[Precision, tuple[int, ...]] = {precision_of_bits(grid.bits): sizes["quantized"]}
    rows |= {kind: sizes[kind] for kind in (*wider, "fp16")}
    table = {f"layers.{layer}": {kind: row[layer] for kind, row in rows.items()} for layer in range(loaded.layers)}
    return Costs(table, precision_of_bits(grid.bits), other)


SCALE_BYTES = 2  # scales are stored in the model's 16-bit type


NO_OVERRIDES: Mapping[str, Precision] = MappingProxyType({})


LayerBytes = dict[str, tuple[int, ...]]


Shape = tuple[int, int]
"""Rows and columns of a weight."""


def quantized_bytes(shapes: Sequence[Shape], grid: Grid) -> int:
    """Bytes of the packed weights of a fusion group with their scales, and zero points where the grid has them.

    A group that the grid does not fit in one of its weights keeps 16 bit as a whole, as it does in the checkpoint.
    """
    if any(misfit(grid, *shape) is not None for shape in shapes):
        return dense_bytes(shapes)
    return sum(_packed_bytes(rows, cols, grid) for rows, cols in shapes)


def _packed_bytes(rows: int, cols: int, grid: Grid) -> int:
    groups = group_count(grid, cols)
    zero_points = 0 if grid.symmetric else rows * groups * grid.bits // 8
    return rows * cols * grid.bits // 8 + rows * groups * SCALE_BYTES + zero_points


def dense_bytes(shapes: Iterable[Shape]) -> int:
    """Bytes of weights in 16 bit."""
    return sum(2 * rows * cols for rows, cols in shapes)


def plan_bytes(
    layer_bytes: LayerBytes,
    other: int,
    protected: Iterable[int],
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
    *,
    quantized: Precision = "int4",
) -> int:
    """Bytes of the whole checkpoint's tensors under a plan.

    Args:
        layer_bytes: the table, as in `SweepReport`.
        other: bytes of everything that is never quantized.
        protected: layers that are 16 bit as a whole.
        overrides: other precisions of layers and units, as in `ProtectionPlan.overrides`; all else is on the grid.
        quantized: the grid's own precision.

    Raises:
        ConfigError: the table has no row for an override (an older sweep, or no unit of the model).
    """
    keep = set(protected)
    costs = [
        layer_bytes["fp16"][layer] if layer in keep else _layer_cost(layer_bytes, layer, overrides, quantized)
        for layer in range(len(layer_bytes["fp16"]))
    ]
    return other + sum(costs)


def placed(choice: Mapping[str, Precision]) -> tuple[tuple[int, ...], dict[str, Precision]]:
    """A choice as `plan_bytes` takes it: layers that are wholly in 16 bit, and precisions of what is elsewhere.

    Args:
        choice: `layers.3` or `layers.3.down` → precision. A unit of a layer that is 16 bit as a whole does not count.
    """
    keep = sorted(int(name.split(".")[1]) for name, kind in choice.items() if name.count(".") == 1 and kind == "fp16")
    return tuple(keep), {name: kind for name, kind in choice.items() if int(name.split(".")[1]) not in keep}


def has_bytes(layer_bytes: LayerBytes, unit: str) -> bool:
    """Whether a table can price a unit: a layer or a fusion group, nothing around the layers and no norm."""
    _, _, rest = unit.partition(".")
    _, _, group = rest.partition(".")
    return unit.startswith("layers.") and (f"fp16.{group}" if group else "fp16") in layer_bytes


def _layer_cost(layer_bytes: LayerBytes, layer: int, overrides: Mapping[str, Precision], quantized: Precision) -> int:
    whole = _row(overrides.get(f"layers.{layer}", quantized), quantized)
    cost = _bytes(layer_bytes, whole, layer)
    prefix = f"layers.{layer}."
    for name, precision in overrides.items():
        if name.startswith(prefix):
            unit = name.removeprefix(prefix)
            cost += _bytes(layer_bytes, f"{_row(precision, quantized)}.{unit}", layer)
            cost -= _bytes(layer_bytes, f"{whole}.{unit}", layer)
    return cost


def _row(precision: Precision, quantized: Precision) -> str:
    return "quantized" if precision == quantized else precision


def _bytes(layer_bytes: LayerBytes, row: str, layer: int) -> int:
    if row not in layer_bytes:
        raise ConfigError(
            f"the bytes of {row!r} in layer {layer} are not known; known are {', '.join(layer_bytes)}. Name a unit of "
            "the model, or sweep again with --precisions."
        )
    return layer_bytes[row][layer]


def with_columns(plan: ProtectionPlan, loaded: Modules, share: float) -> ProtectionPlan:
    """The plan with a share of the input channels of what it quantizes in 16 bit, their bytes and a reason added."""
    if not share:
        return plan
    selected = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    cost = _cost(selected, loaded, share)
    return replace(
        plan,
        protect_columns=share,
        extra_bytes=plan.extra_bytes + cost,
        overhead=round((plan.extra_bytes + cost) / _floor(loaded, plan.grid), 6),
        reasons=(*plan.reasons, f"{100 * share:.3g}% of the input channels of each quantized module: {cost} bytes"),
    )


def layers_budget(loaded: Modules, grid: Grid, share: float, max_overhead: float) -> float:
    """What is left of a budget for layers, if everything is quantized but a share of the input channels.

    Raises:
        ConfigError: nothing is.
    """
    if not share:
        return max_overhead
    cost = _cost(select_modules(loaded, grid), loaded, share) / _floor(loaded, grid)
    if cost > max_overhead:
        raise ConfigError(
            f"protect_columns {share:g} alone costs {cost:.1%} extra bytes, more than max_overhead {max_overhead:.1%}; "
            "protect fewer columns, or raise the budget"
        )
    return max_overhead - cost


def _cost(selected: Selection, loaded: Modules, share: float) -> int:
    names = [name for name in selected.modules if has_columns(selected.grids[name], share)]
    return sum(column_bytes(*loaded.matrix(name), share) for name in names)


def _floor(loaded: Modules, grid: Grid) -> int:
    return plan_bytes(*count_bytes(loaded, grid), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes of the tensors of a checkpoint."""

    plan: int
    """With the protected layers in 16 bit, all others quantized."""
    quantized: int
    """All layers quantized."""
    sixteen_bit: int


def count_disk(outline: Modules, grid: Grid, protected: Sequence[int]) -> Disk:
    """The sizes under a plan that protects some layers."""
    table, other = count_bytes(outline, grid)
    return Disk(
        plan=plan_bytes(table, other, protected),
        quantized=plan_bytes(table, other, ()),
        sixteen_bit=plan_bytes(table, other, range(outline.layers)),
    )


def count_bytes(
    loaded: Modules, grid: Grid, precisions: Sequence[Precision] = ()
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Bytes of each layer's linear weights, whole and by unit (see `sizes`), and the bytes of everything else.

    Args:
        loaded: the model.
        grid: the grid of what is quantized.
        precisions: what else to count, besides `fp16`, the grid and `int8`.
    """
    grids = {"quantized": grid, "int8": replace(grid, bits=8)}
    grids |= {kind: replace(grid, bits=bits_of_precision(kind)) for kind in precisions if kind != "fp16"}
    costs: dict[str, Callable[[Sequence[Shape]], int]] = {
        "fp16": dense_bytes,
        **{kind: partial(quantized_bytes, grid=own) for kind, own in grids.items()},
    }
    sizes: dict[str, tuple[int, ...]] = {}
    by_unit = {
        unit.name: [
            [loaded.matrix(f"{loaded.family.blocks}.{layer}.{module}") for module in unit.modules]
            for layer in range(loaded.layers)
        ]
        for unit in loaded.family.units
    }
    for kind, cost in costs.items():
        own = {f"{kind}.{name}": tuple(map(cost, layers)) for name, layers in by_unit.items()}
        sizes |= {kind: tuple(map(sum, zip(*own.values(), strict=True)))} | own
    return sizes, 2 * loaded.parameters - sum(sizes["fp16"])


@dataclass(frozen=True, slots=True)
class Costs:
    """The bytes of every unit in every precision, in forward order; all else costs the same under every plan."""

    bytes_: Mapping[str, Mapping[Precision, int]]
    quantized: Precision
    """What a unit gets that a plan does not name."""
    other_bytes: int = 0

    def __post_init__(self) -> None:
        """Check that protecting a unit costs something in every unit."""
        if not self.bytes_:
            raise ConfigError("no unit has bytes, so there is nothing to control for")
        for unit, options in self.bytes_.items():
            if self.quantized not in options or "fp16" not in options:
                raise ConfigError(f"unit {unit!r} has bytes in {sorted(options)}: give {self.quantized} and fp16")
            if options["fp16"] <= options[self.quantized]:
                raise ConfigError(f"unit {unit!r} is not smaller in {self.quantized} than in fp16; leave it out")

    @property
    def units(self) -> tuple[str, ...]:
        """Names in forward order."""
        return tuple(self.bytes_)

    @property
    def tolerance(self) -> float:
        """Half of what the cheapest unit costs to protect: no set of whole units can be told to come nearer."""
        return min(options["fp16"] - options[self.quantized] for options in self.bytes_.values()) / 2

    def total(self, precisions: Mapping[str, Precision]) -> int:
        """Bytes of the checkpoint under a plan.

        Raises:
            ConfigError: a unit or precision without bytes.
        """
        for unit, precision in precisions.items():
            if precision not in self.bytes_.get(unit, {}):
                raise ConfigError(f"unit {unit!r} has no bytes in {precision}; give the plan's own bytes instead")
        return self.other_bytes + sum(
            options[precisions.get(unit, self.quantized)] for unit, options in self.bytes_.items()
        )
