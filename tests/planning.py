"""Plans of given layers and units, and models quantized by them, without a sweep and without the costs of plans."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from quant_fairness_plugin.artifacts import Grid, Precision, ProtectionPlan
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.selection import NO_OVERRIDES
from quant_fairness_plugin.quantize.stream import quantize_model


def plan_of_layers(
    loaded: LoadedModel,
    protected: Collection[int] = (),
    *,
    grid: Grid,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
    columns: float = 0.0,
) -> ProtectionPlan:
    """The bytes are made up: no test of quantization or export reads them."""
    units: dict[str, Precision] = {f"layers.{i}": grid.precision for i in range(loaded.layers)}
    return ProtectionPlan(
        model=loaded.files.name,
        units=units | {f"layers.{i}": "fp16" for i in protected} | dict(overrides),
        grid=grid,
        source="explicit",
        reasons=("chosen by the test",),
        stable=True,
        predicted=False,
        extra_bytes=1024,
        overhead=0.125,
        protect_columns=columns,
    )


def quantize_layers(
    loaded: LoadedModel,
    protected: Collection[int],
    *,
    grid: Grid,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
    columns: float = 0.0,
    **options: Any,
) -> QuantizedModel:
    """`quantize_model` by the plan of these layers and units."""
    plan = plan_of_layers(loaded, protected, grid=grid, overrides=overrides, columns=columns)
    return quantize_model(loaded, plan, **options)
