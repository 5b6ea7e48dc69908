"""What a plan costs in bytes: of a matrix, a unit, a layer, a checkpoint, and of its 16-bit channels. No torch.

The bytes of a model are a table, `LayerBytes`: a row for every precision (`fp16`, `quantized` for the grid's own,
`int8`, …) and one for every fusion group in it (`int8.down`), with a column for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from quant_fairness_plugin.artifacts import Grid, Precision, ProtectionPlan, Unit, bits_of_precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.gguf import BLOCK
from quant_fairness_plugin.quantize.grid_rules import column_bytes, group_count, has_columns, misfit, unit_grid
from quant_fairness_plugin.quantize.schemes import DIVISOR_BYTES, find_scheme
from quant_fairness_plugin.quantize.selection import Modules, Selection, select_modules

SCALE_BYTES = 2  # scales of integers are stored in the model's 16-bit type
WIDER: tuple[Precision, ...] = ("int3", "int4", "int5", "int8")
"""More bits for everything: what the bytes of a protected layer could buy instead, where the grid has fewer."""
NO_OVERRIDES: Mapping[str, Precision] = MappingProxyType({})

LayerBytes = dict[str, tuple[int, ...]]
Shape = tuple[int, int]
"""Rows and columns of a weight."""


def dense_bytes(shapes: Iterable[Shape]) -> int:
    """Return the bytes of weights in 16 bit."""
    return sum(2 * rows * cols for rows, cols in shapes)


def quantized_bytes(shapes: Sequence[Shape], grid: Grid) -> int:
    """Return the bytes of a fusion group's packed weights with their scales, and zero points where the grid has them.

    The group takes the largest group size, up to the grid's, that fits all its weights; where none does it stays in
    16 bit as a whole, as it does in the checkpoint.
    """
    grid = unit_grid(grid, (cols for _, cols in shapes))
    if any(misfit(grid, *shape) is not None for shape in shapes):
        return dense_bytes(shapes)
    return sum(_packed_bytes(rows, cols, grid) for rows, cols in shapes)


def _packed_bytes(rows: int, cols: int, grid: Grid) -> int:
    groups, scheme = group_count(grid, cols), find_scheme(grid)
    if scheme is not None:
        divisor = DIVISOR_BYTES if scheme.divided else 0
        return rows * cols * grid.bits // 8 + rows * groups * scheme.scale_bytes + divisor
    zero_points = 0 if grid.symmetric else rows * groups * grid.bits // 8
    return rows * cols * grid.bits // 8 + rows * groups * SCALE_BYTES + zero_points


def count_bytes(
    loaded: Modules, grid: Grid, precisions: Sequence[Precision] = (), *, eight_bit_tables: bool = False
) -> tuple[LayerBytes, int]:
    """Return the table of the bytes of each layer's linear weights, and the bytes of everything else.

    Args:
        loaded: the model.
        grid: the grid of what is quantized.
        precisions: what else to count, beside `fp16`, the grid and `int8`.
        eight_bit_tables: embedding and head are stored as llama.cpp's Q8_0, where its blocks divide their columns.
    """
    grids = {"quantized": grid, "int8": grid.at("int8")}
    grids |= {kind: grid.at(kind) for kind in precisions if kind != "fp16"}
    costs: dict[str, Callable[[Sequence[Shape]], int]] = {"fp16": dense_bytes}
    costs |= {kind: partial(quantized_bytes, grid=of_kind) for kind, of_kind in grids.items()}
    # A layer without a unit of this name has no bytes in its row.
    shapes: dict[str, list[list[Shape]]] = {
        name: [[] for _ in range(loaded.layers)] for name in loaded.family.unit_names
    }
    for layer in range(loaded.layers):
        for unit in loaded.family.units_of(layer):
            names = [f"{loaded.family.blocks}.{layer}.{module}" for module in unit.modules]
            shapes[unit.name][layer] = [loaded.matrix(name) for name in names]
    table: LayerBytes = {}
    for kind, cost in costs.items():
        groups = {f"{kind}.{name}": tuple(map(cost, layers)) for name, layers in shapes.items()}
        table |= {kind: tuple(map(sum, zip(*groups.values(), strict=True)))} | groups
    saved = _saved_by(loaded.table_shapes()) if eight_bit_tables else 0
    return table, 2 * loaded.parameters - sum(table["fp16"]) - saved


def _saved_by(tables: Iterable[Shape]) -> int:
    """Bytes that tables in Q8_0 save over 16 bit."""
    grid = Grid(bits=8, group_size=BLOCK)
    return sum(2 * rows * cols - _packed_bytes(rows, cols, grid) for rows, cols in tables if cols % BLOCK == 0)


def has_bytes(layer_bytes: LayerBytes, unit: str) -> bool:
    """Return whether a table can price a unit: a layer or a fusion group, nothing around the layers and no norm."""
    return Unit.is_name(unit) and _row("fp16", Unit.parse(unit).group) in layer_bytes


def plan_bytes(
    layer_bytes: LayerBytes,
    other: int,
    protected: Iterable[int],
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
    *,
    quantized: Precision = "int4",
) -> int:
    """Return the bytes of the whole checkpoint's tensors under a plan.

    Args:
        layer_bytes: the table, as in `SweepReport`.
        other: bytes of everything that is never quantized.
        protected: layers that are 16 bit as a whole.
        overrides: other precisions of layers and units, as in `ProtectionPlan.overrides`; all else is on the grid.
        quantized: the grid's precision.

    Raises:
        ConfigError: the table has no row for an override (an older sweep, or no unit of the model).
    """
    dense = set(protected)
    by_unit = {Unit.parse(name): "quantized" if kind == quantized else kind for name, kind in overrides.items()}
    costs = [
        layer_bytes["fp16"][layer] if layer in dense else _layer_cost(layer_bytes, layer, by_unit)
        for layer in range(len(layer_bytes["fp16"]))
    ]
    return other + sum(costs)


def _layer_cost(layer_bytes: LayerBytes, layer: int, overrides: Mapping[Unit, str]) -> int:
    whole = overrides.get(Unit(layer), "quantized")
    cost = _bytes(layer_bytes, _row(whole), layer)
    for unit, kind in overrides.items():
        if unit.layer == layer and unit.group is not None:
            cost += _bytes(layer_bytes, _row(kind, unit.group), layer)
            cost -= _bytes(layer_bytes, _row(whole, unit.group), layer)
    return cost


def _row(kind: str, group: str | None = None) -> str:
    return kind if group is None else f"{kind}.{group}"


def _bytes(layer_bytes: LayerBytes, row: str, layer: int) -> int:
    if row not in layer_bytes:
        raise ConfigError(
            f"the bytes of {row!r} in layer {layer} are not known; known are {', '.join(layer_bytes)}. Name a unit of "
            "the model, or sweep again with --precisions."
        )
    return layer_bytes[row][layer]


def layers_and_overrides(precisions: Mapping[str, Precision]) -> tuple[tuple[int, ...], dict[str, Precision]]:
    """Return a plan as `plan_bytes` takes it: layers that are wholly in 16 bit, and precisions of what is elsewhere.

    Args:
        precisions: `layers.3` or `layers.3.down` → precision. A unit of a layer that is 16 bit as a whole does not
            count.
    """
    units = {name: Unit.parse(name) for name in precisions}
    dense = sorted(unit.layer for name, unit in units.items() if unit.group is None and precisions[name] == "fp16")
    return tuple(dense), {name: kind for name, kind in precisions.items() if units[name].layer not in dense}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes of the tensors of a checkpoint."""

    plan: int
    """With the protected layers in 16 bit, all others quantized."""
    quantized: int
    """All layers quantized."""
    sixteen_bit: int


def count_disk(outline: Modules, grid: Grid, protected: Sequence[int]) -> Disk:
    """Return the sizes under a plan that protects some layers."""
    table, other = count_bytes(outline, grid)
    return Disk(
        plan=plan_bytes(table, other, protected),
        quantized=plan_bytes(table, other, ()),
        sixteen_bit=plan_bytes(table, other, range(outline.layers)),
    )


def with_columns(plan: ProtectionPlan, loaded: Modules, share: float) -> ProtectionPlan:
    """Return the plan with a share of the input channels of what it quantizes in 16 bit, their bytes and a reason."""
    if not share:
        return plan
    selected = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    cost = _columns_cost(selected, loaded, share)
    return replace(
        plan,
        protect_columns=share,
        extra_bytes=plan.extra_bytes + cost,
        overhead=round((plan.extra_bytes + cost) / _all_quantized(loaded, plan.grid), 6),
        reasons=(*plan.reasons, f"{100 * share:.3g}% of the input channels of each quantized module: {cost} bytes"),
    )


def layers_budget(loaded: Modules, grid: Grid, share: float, max_overhead: float) -> float:
    """Return what is left of a budget for layers, if everything is quantized but a share of the input channels.

    Raises:
        ConfigError: nothing is.
    """
    if not share:
        return max_overhead
    cost = _columns_cost(select_modules(loaded, grid), loaded, share) / _all_quantized(loaded, grid)
    if cost > max_overhead:
        raise ConfigError(
            f"protect_columns {share:g} alone costs {cost:.1%} extra bytes, more than max_overhead {max_overhead:.1%}; "
            "protect fewer columns, or raise the budget"
        )
    return max_overhead - cost


def bytes_at_bits(layer_bytes: LayerBytes, other: int, bits: float) -> int:
    """Return the bytes of a checkpoint whose layers take so many bits a weight on average, scales included.

    Args:
        layer_bytes: the table, as in `SweepReport`.
        other: bytes of everything that is never quantized.
        bits: 16 is the original.
    """
    return other + int(sum(layer_bytes["fp16"]) * bits / 16)


def _columns_cost(selected: Selection, loaded: Modules, share: float) -> int:
    names = [name for name in selected.modules if has_columns(selected.grids[name], share)]
    return sum(column_bytes(*loaded.matrix(name), share) for name in names)


def _all_quantized(loaded: Modules, grid: Grid) -> int:
    return plan_bytes(*count_bytes(loaded, grid), ())


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
        """Half of what the cheapest unit costs to protect: no set of whole units comes nearer for certain."""
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


def layer_costs(loaded: Modules, grid: Grid) -> Costs:
    """Return the bytes of every whole layer on the grid, with more bits, and in 16 bit."""
    quantized = grid.precision
    wider = tuple(kind for kind in WIDER if bits_of_precision(kind) > grid.bits)
    sizes, other = count_bytes(loaded, grid, wider)
    rows = {quantized: sizes["quantized"]} | {kind: sizes[kind] for kind in (*wider, "fp16")}
    table = {str(Unit(layer)): {kind: row[layer] for kind, row in rows.items()} for layer in range(loaded.layers)}
    return Costs(table, quantized, other)
