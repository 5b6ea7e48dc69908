"""Plans and what they cost, from a table of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from quant_fairness_plugin.artifacts import (
    Grid,
    Precision,
    ProtectionPlan,
    Provenance,
    SweepReport,
    SweepRow,
    Unit,
    precision_words,
)
from quant_fairness_plugin.plans.costs import NO_OVERRIDES, LayerBytes, has_bytes, layers_and_overrides, plan_bytes

Choice = Mapping[str, Precision]
"""Layer (`layers.3`) or unit (`layers.3.down`) → what it gets instead of the grid's precision."""


class Priced(Protocol):
    """What is known of a model's bytes: a sweep's report, or scores."""

    @property
    def provenance(self) -> Provenance:
        """Names the model."""

    @property
    def grid(self) -> Grid:
        """The grid of what is not singled out."""

    @property
    def layer_bytes(self) -> LayerBytes:
        """As in `SweepReport`."""

    @property
    def other_bytes(self) -> int:
        """As in `SweepReport`."""


def explicit_plan(
    layers: Sequence[int],
    *,
    model: str,
    grid: Grid,
    layer_bytes: LayerBytes,
    other_bytes: int,
    overrides: Choice = NO_OVERRIDES,
) -> ProtectionPlan:
    """Return the plan that the user wrote down, with what it costs.

    Args:
        layers: protected layers, checked; empty for none.
        model: the model's name.
        grid: grid of the other layers.
        layer_bytes: as in `SweepReport`.
        other_bytes: as in `SweepReport`.
        overrides: precisions of single layers and units, as in `ProtectionPlan.overrides`.

    Raises:
        ConfigError: an override of a unit that `layer_bytes` does not know.
    """
    source = "explicit" if layers or overrides else "none"
    choice: dict[str, Precision] = {**overrides, **{str(Unit(layer)): "fp16" for layer in layers}}
    return _assemble(choice, source, ("given by the user",), True, model, grid, layer_bytes, other_bytes)


def plan_of(report: Priced, choice: Choice, *, source: str, reasons: tuple[str, ...], stable: bool) -> ProtectionPlan:
    """Return the plan of a choice among the units of a sweep."""
    model, sizes = report.provenance.model, report.layer_bytes
    return _assemble(choice, source, reasons, stable, model, report.grid, sizes, report.other_bytes)


def bytes_of(report: Priced, choice: Choice) -> int:
    """Return the bytes of the whole checkpoint's tensors under a choice; with an empty one all is quantized."""
    keep, others = layers_and_overrides(choice)
    quantized = report.grid.precision
    return plan_bytes(report.layer_bytes, report.other_bytes, keep, others, quantized=quantized)


def row_choice(report: SweepReport, row: SweepRow) -> Choice:
    """Return what a row of a sweep gives its units; under `quantize` all others keep 16 bit."""
    if row.mode == "quantize-one":
        return {unit: "fp16" for unit in report.units if unit not in row.units}
    assert row.precision is not None or not row.units
    return {} if row.precision is None else dict.fromkeys(row.units, row.precision)


def priced_units(report: SweepReport) -> tuple[str, ...]:
    """Return the units of a sweep whose bytes are known: those that a checkpoint can hold in another precision."""
    return tuple(unit for unit in report.units if has_bytes(report.layer_bytes, unit))


def describe_overrides(plan: ProtectionPlan) -> str:
    """Write what a plan gives single layers and units: `layers 3, 5 in 8 bit; 7.down in 16 bit`. Empty if none."""
    groups: dict[tuple[Precision, bool], list[str]] = {}
    for name, precision in plan.overrides.items():
        unit = Unit.parse(name)
        groups.setdefault((precision, unit.group is None), []).append(unit.short)
    return "; ".join(
        f"{'' if not whole else 'layer ' if len(places) == 1 else 'layers '}{', '.join(places)} in "
        f"{precision_words(precision)}"
        for (precision, whole), places in groups.items()
    )


def _assemble(
    choice: Choice,
    source: str,
    reasons: tuple[str, ...],
    stable: bool,
    model: str,
    grid: Grid,
    layer_bytes: LayerBytes,
    other_bytes: int,
) -> ProtectionPlan:
    keep, others = layers_and_overrides(choice)
    quantized = grid.precision
    floor = plan_bytes(layer_bytes, other_bytes, ())
    extra = plan_bytes(layer_bytes, other_bytes, keep, others, quantized=quantized) - floor
    whole: dict[str, Precision] = {
        str(Unit(i)): "fp16" if i in keep else quantized for i in range(len(layer_bytes["fp16"]))
    }
    return ProtectionPlan(
        model=model,
        units=whole | others,
        grid=grid,
        source=source,
        reasons=reasons,
        stable=stable,
        predicted=True,
        extra_bytes=extra,
        overhead=round(extra / floor, 6),
    )
