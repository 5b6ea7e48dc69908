"""What a sweep refuses once the model's files are known, before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from quant_fairness_plugin.artifacts import Precision, Unit
from quant_fairness_plugin.cli.sweep_options import ExecutionOptions, PlansOptions
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.plans.plan_set import check_around, check_plans
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.plans.units import name_units
from quant_fairness_plugin.sweep.bank_rules import check_bank
from quant_fairness_plugin.sweep.memory import check_budget, parse_size


def check_sets(files: ModelFiles, config: FairConfig, plans: PlansOptions, search: Search | None) -> None:
    """Refuse sets of all layers, and units around the layers that the model does not have.

    Raises:
        ConfigError: as said.
    """
    if plans.granularity == "layer":
        check_plans(plans.mode, [str(Unit(layer)) for layer in range(files.layers)], plans.combine)
        if search is not None:
            search.check(files.layers)
    if plans.also:
        outline = outline_model(files)
        units = name_units(outline.family, outline.layers, outline.shapes)
        check_around(plans.also, units, outline.shapes, config.grid)


def check_execution(
    files: ModelFiles,
    config: FairConfig,
    execution: ExecutionOptions,
    *,
    also: Sequence[str],
    precisions: Sequence[Precision],
) -> int | None:
    """Return the memory budget in bytes, checked against the model's files, like the bank.

    Raises:
        ConfigError: a bank or a budget together with what it excludes, or a bank of another model.
        ResourceError: a budget that is too small.
    """
    bank, budget = execution.bank, execution.memory_budget
    if bank is not None:
        if also or budget is not None or tuple(precisions) != ("fp16",):
            raise ConfigError(
                "--bank goes without --memory-budget, --precisions and --also: a checkpoint has one precision, and "
                "what is around its layers is 16 bit. Leave one of them out."
            )
        check_bank(bank, files, config.grid)
    if budget is None:
        return None
    if execution.executor is not None:
        raise ConfigError(
            f"--memory-budget {budget} and --executor {execution.executor} do not go together: each trial of an "
            "executor takes the whole model. Leave one of them out."
        )
    size = parse_size(budget)
    check_budget(outline_model(files), size, precisions=len({*precisions, config.bits} - {"fp16"}))
    return size
