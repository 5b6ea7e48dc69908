"""The quantized model that an analysis compares: a checkpoint, or all layers rounded to nearest in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.measure.scoring import ModelState
from quant_fairness_plugin.model.exchange import exchanged
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.steps import check_folder, exported_state
from quant_fairness_plugin.sweep.bank import RtnBank, check_bank_fits


def quantized_state(loaded: LoadedModel, grid: Grid, checkpoint: Path | None) -> ModelState:
    """Return the state to compare with the 16-bit model.

    Args:
        loaded: the 16-bit model.
        grid: of the rounding, where there is no checkpoint.
        checkpoint: a folder that was made from this model.

    Raises:
        ConfigError: a checkpoint of another model, or a grid that fits no module.
    """
    if checkpoint is not None:
        check_folder(checkpoint, loaded)
        return exported_state(checkpoint, loaded)
    return rounded_state(loaded, grid)


def rounded_state(loaded: LoadedModel, grid: Grid) -> ModelState:
    """Return the model with every linear weight of every layer rounded to nearest, in place while it is applied."""
    units, precision = map_units(loaded), grid.precision
    bank = RtnBank(loaded, units, grid)
    check_bank_fits(bank, units, precision)
    weights = {name: value for unit in units.group_names() for name, value in bank.weights(unit, precision).items()}

    @contextmanager
    def applied() -> Iterator[PreTrainedModel]:
        with exchanged(loaded.model, weights):
            yield loaded.model

    return ModelState(f"rtn {grid}", applied)
