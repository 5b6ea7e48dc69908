"""Plans: what the configuration, a sweep or a file says, checked against the model, the format and the reader."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace

from quant_fairness_plugin.artifacts import Precision, ProtectionPlan, SweepReport, UnitScores
from quant_fairness_plugin.checkpoint.readers import check_exportable, takes_one_group_size
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.planning import limit_of
from quant_fairness_plugin.plans.costs import NO_OVERRIDES, count_bytes, with_columns
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.selection import group_sizes, select_modules
from quant_fairness_plugin.recommend import explicit_plan, recommend_plan
from quant_fairness_plugin.recommend.assembly import Choice

_logger = logging.getLogger(__name__)


def recommend(loaded: LoadedModel, config: FairConfig, report: SweepReport | None) -> ProtectionPlan:
    """Return the plan of a configuration, its 16-bit input channels included.

    Args:
        loaded: the model.
        config: names the layers, or leaves them to a sweep with `protect_layers="auto"`.
        report: the sweep, for `auto`.

    Raises:
        ConfigError: `auto` without a sweep, `top` is not a number of the units that were swept, or the objective is
            undefined for the sweep.
        QualityGateError: the ranking is unstable and the configuration is strict.
    """
    if config.protect_layers == "auto":
        if report is None:
            raise ConfigError('protect_layers "auto" needs a sweep; sweep first, or list the layers')
        plan = recommend_plan(
            report,
            limit_of(loaded, config),
            objective=config.decides_by,
            top=config.top,
            strict=config.strict,
            overrides=config.overrides,
        )
    else:
        layers = () if config.protect_layers == "none" else config.protect_layers
        plan = plan_of_layers(loaded, config, layers, config.overrides)
    return with_columns(plan, loaded, config.protect_columns)


def plan_of_layers(
    loaded: LoadedModel, config: FairConfig, layers: tuple[int, ...], overrides: Choice = NO_OVERRIDES
) -> ProtectionPlan:
    """Return the plan that keeps these layers in 16 bit, and gives units the precisions of `overrides`."""
    layer_bytes, other_bytes = count_bytes(loaded, config.grid, eight_bit_tables=config.eight_bit_tables)
    return explicit_plan(
        layers,
        model=loaded.files.name,
        grid=config.grid,
        layer_bytes=layer_bytes,
        other_bytes=other_bytes,
        overrides=overrides,
    )


def plan_of_quantized(quantized: QuantizedModel, loaded: LoadedModel) -> ProtectionPlan:
    """Return the plan that a quantized model of this model was made by.

    Raises:
        ConfigError: another model, or another instance of it, was quantized.
    """
    if quantized.loaded is not loaded:
        raise ConfigError(
            f"the quantized model was made from another instance of {quantized.loaded.files.name}; one made by this "
            "quantizer or a copy of it is accepted. Export it with the quantizer that made it"
        )
    return quantized.plan


def fitting_plan(plan: ProtectionPlan, loaded: LoadedModel, config: FairConfig) -> ProtectionPlan:
    """Return a plan with the bytes that it costs in this model; one that was made for another model is warned of.

    Raises:
        ConfigError: a plan for another number of layers, or for another grid than the configuration's, or of units
            that the model lacks.
        UnsupportedModelError: group sizes that the format or the reader does not take; names the ways out.
    """
    if plan.layers == loaded.layers and takes_one_group_size(config.format, config.reader):
        sizes = group_sizes(loaded, plan.grid, protected=plan.protected_layers).values()
        if len(set(sizes)) > 1:
            form, reader = config.format, config.reader
            check_exportable(loaded.family, format=form, grid=plan.grid, reader=reader, group_sizes=sizes)
    if (plan.layers, plan.grid) != (loaded.layers, config.grid):
        raise ConfigError(
            f"the plan is for {plan.layers} layers of {plan.model} and {plan.grid}; here are {loaded.layers} "
            f"layers and {config.grid}. Name the plan's model and grid, or make another plan"
        )
    if plan.model == loaded.files.name:
        return plan
    _logger.warning(
        "the plan was made for %s, and is followed for %s: what it predicts is said of the former", plan.model,
        loaded.files.name,
    )  # fmt: skip
    select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    here = plan_of_layers(loaded, config, plan.protected_layers, plan.overrides)
    reasons = tuple(f"of {plan.model}: {reason}" for reason in plan.reasons)
    return with_columns(
        replace(here, source=plan.source, stable=plan.stable, predicted=True, reasons=reasons), loaded,
        plan.protect_columns,
    )  # fmt: skip


def check_report(report: SweepReport | UnitScores, loaded: LoadedModel, config: FairConfig) -> None:
    """Refuse a sweep that the plan cannot come from.

    Raises:
        ConfigError: the configuration names the layers, or a sweep of another number of layers or another grid.
    """
    if config.protect_layers != "auto":
        raise ConfigError(
            f"protect_layers {config.protect_layers!r} leaves a sweep nothing to decide; a report is accepted with "
            '"auto". Call protecting("auto") first'
        )
    if (report.layers, report.grid) != (loaded.layers, config.grid):
        raise ConfigError(
            f"the sweep is of {report.layers} layers and {report.grid}; here are {loaded.layers} layers and "
            f"{config.grid}. Sweep this model on this grid"
        )


def check_exportable_before_sweep(loaded: LoadedModel, config: FairConfig) -> dict[str, Precision]:
    """Check what is known of the plan before its sweep against format and reader, and return these precisions.

    Raises:
        UnsupportedModelError: the reader could not load a checkpoint with them; names the ways out.
        ConfigError: the model was opened with a memory budget, so that it cannot be quantized.
    """
    expected = config.overrides
    if config.protect_layers == "auto" and config.precisions is not None and "int8" in config.precisions:
        expected = {"layers.0": "int8", **expected}
    check_exportable_plan(loaded, config, expected)
    return expected


def check_exportable_plan(
    loaded: LoadedModel, config: FairConfig, overrides: Mapping[str, Precision], *, protected: Collection[int] = ()
) -> None:
    """Check precisions and group sizes against format and reader. Raises as `check_exportable_before_sweep`."""
    check_exportable(
        loaded.family,
        format=config.format,
        grid=config.grid,
        reader=config.reader,
        overrides=overrides,
        group_sizes=group_sizes(loaded, config.grid, protected=protected).values(),
        dtype=str(loaded.storage_dtype).removeprefix("torch."),
    )
