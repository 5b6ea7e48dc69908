"""Bytes that a plan costs on disk, from weight shapes alone.

A table of bytes has one entry per layer under `fp16`, `quantized` (the grid), `int8` (the grid with 8 bits) and other
precisions that were asked for, and under `<one of these>.<unit>` for each fusion group of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.grid_rules import group_count, misfit

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
