"""What a sweep refuses once the model's files are known, before torch is loaded."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import Unit
from quant_fairness_plugin.cli.sweep_options import ExecutionOptions
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.sizes import parse_size
from quant_fairness_plugin.plans.plan_set import check_plans
from quant_fairness_plugin.plans.units import check_around, name_units
from quant_fairness_plugin.sweep.bank_rules import check_bank
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.memory import check_budget


def check_sets(files: ModelFiles, config: FairConfig, wanted: SweepConfig) -> None:
    """Refuse plans that single out every layer, and names around the layers that the model does not have.

    Raises:
        ConfigError: as said.
    """
    if wanted.granularity == "layer":
        check_plans(wanted.modes, [str(Unit(layer)) for layer in range(files.layers)], wanted.combine)
        if wanted.search is not None:
            wanted.search.check(files.layers)
    if wanted.also:
        outline = outline_model(files)
        units = name_units(outline.family, outline.layers, outline.shapes)
        check_around(wanted.also, units, outline.shapes, config.fitted(outline).grid)


def check_execution(
    files: ModelFiles, config: FairConfig, execution: ExecutionOptions, wanted: SweepConfig
) -> int | None:
    """Return the memory budget in bytes, checked against the model's files, like the bank.

    Raises:
        ConfigError: a bank or a budget together with what it excludes, or a bank of another model.
        ResourceError: a budget that is too small.
    """
    bank, budget = execution.bank, execution.memory_budget
    if bank is not None:
        if wanted.also or budget is not None or wanted.precisions != ("fp16",):
            raise ConfigError(
                "--bank goes without --memory-budget, --precisions and --also: a checkpoint has one precision, and "
                "what is around its layers is 16 bit. Leave one of them out."
            )
        check_bank(bank, files, config.fitted(outline_model(files)).grid)
    if budget is None:
        return None
    if execution.executor is not None:
        raise ConfigError(
            f"--memory-budget {budget} and --executor {execution.executor} do not go together: each trial of an "
            "executor takes the whole model. Leave one of them out."
        )
    size = parse_size(budget)
    check_budget(outline_model(files), size, precisions=len({*wanted.precisions, config.bits} - {"fp16"}))
    return size
