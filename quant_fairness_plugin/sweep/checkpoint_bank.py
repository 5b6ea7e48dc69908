"""A quantized checkpoint as the bank that a sweep takes its quantized weights from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Unit
from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE
from quant_fairness_plugin.checkpoint.dequantize import Checkpoint, open_checkpoint
from quant_fairness_plugin.checkpoint.folder import (
    read_config,
    read_quantization,
    weight_files,
)
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import CheckpointBank
from quant_fairness_plugin.sweep.bank_rules import check_bank, checkpoint_grid
from quant_fairness_plugin.sweep.jobs import BankRecipe

_logger = logging.getLogger(__name__)


def bank_recipe(folder: Path, grid: Grid) -> BankRecipe:
    """Return what opens the bank, here or in a worker process."""
    return partial(open_bank, folder=folder.resolve(), grid=grid)


def open_bank(loaded: LoadedModel, units: UnitMap, *, folder: Path, grid: Grid) -> CheckpointBank:
    """Return the bank of a checkpoint folder, ours or another tool's. Weights are read when a unit first needs them.

    AWQ moves scales from one module of a layer to another and into its norms. Such a layer is exchanged as a whole,
    with all of its folded parameters: in 16 bit it computes the same as before. Its units cannot be exchanged alone.

    Args:
        loaded: the 16-bit model.
        units: its units.
        folder: the checkpoint.
        grid: the sweep's grid.

    Raises:
        ArtifactError: files that are missing or malformed.
        ConfigError: a checkpoint of another model, or on another grid.
        UnsupportedModelError: a checkpoint that cannot be taken apart by layers.
    """
    check_bank(folder, loaded.files, grid)
    if (folder / COLUMNS_FILE).exists():
        raise UnsupportedModelError(
            f"--bank {folder}: keeps input channels in 16 bit beside its integers ({COLUMNS_FILE}), which a sweep "
            "cannot single out; export one with --protect-columns 0"
        )
    checkpoint = open_checkpoint(folder)
    quantized = {f"{module}.weight": partial(_dense, loaded, checkpoint, module) for module in checkpoint.packed}
    for name in quantized:
        _check_parameter(folder, loaded, name)
    bank = CheckpointBank(
        units,
        precision=checkpoint_grid(folder, read_quantization(folder)[0]).precision,
        quantized=quantized,
        folded=dict(_folded(folder, loaded, checkpoint)),
        description=_description(folder, checkpoint, units, set(quantized)),
        recipe=bank_recipe(folder, grid),
    )
    dense = _dense_units(units, set(quantized))
    if dense:
        _logger.warning("bank %s: in 16 bit in every plan, as in the checkpoint: %s", folder, ", ".join(dense))
    return bank


def _dense(loaded: LoadedModel, checkpoint: Checkpoint, module: str) -> Tensor:
    """Return a quantized module's weight as the model stores it."""
    original = loaded.model.get_parameter(f"{module}.weight")
    weight = checkpoint.dense(module)
    weight = weight.t().contiguous() if is_conv1d(loaded.model.get_submodule(module)) else weight
    if weight.shape != original.shape:
        raise ConfigError(
            f"bank: {module} is {list(weight.shape)} in the checkpoint and {list(original.shape)} in the model. Use a "
            "checkpoint of this model."
        )
    return weight.to(original)


def _check_parameter(folder: Path, loaded: LoadedModel, name: str) -> None:
    try:
        loaded.model.get_parameter(name)
    except AttributeError as err:
        raise ConfigError(
            f"--bank {folder}: quantizes {name}, which {loaded.files.name} does not have. Use a checkpoint of that "
            "model."
        ) from err


def _folded(folder: Path, loaded: LoadedModel, checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The 16-bit parameters of blocks that have other values in the checkpoint.

    Raises:
        ConfigError: one outside of the blocks has.
    """
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    for stored in checkpoint.plain:
        name = loaded.family.loaded_name(stored)
        if name not in parameters:
            continue
        value = checkpoint.tensor(stored)
        # Compared in the checkpoint's own type: some tools store float16 where the model has bfloat16.
        if torch.equal(parameters[name].detach().to("cpu", value.dtype), value):
            continue
        if not name.startswith(f"{loaded.family.blocks}."):
            raise ConfigError(
                f"--bank {folder}: {name} has other values than in {loaded.files.name}, so it was made from another "
                "model. Use a checkpoint of this model."
            )
        yield name, partial(_plain, checkpoint, stored, parameters[name])


def _plain(checkpoint: Checkpoint, stored: str, original: Tensor) -> Tensor:
    return checkpoint.tensor(stored).to(original)


def _dense_units(units: UnitMap, quantized: set[str]) -> list[str]:
    """Return the layers, and fusion groups of other layers, that the checkpoint holds in 16 bit: `0`, `3.down`."""
    dense: list[Unit] = []
    for layer in map(Unit, range(units.layers)):
        groups = [layer.part(group) for group in units.groups_of(layer.layer)]
        unquantized = [unit for unit in groups if quantized.isdisjoint(units.parameters[str(unit)])]
        dense += [layer] if unquantized == groups else unquantized
    return [unit.short for unit in dense]


def _description(folder: Path, checkpoint: Checkpoint, units: UnitMap, quantized: set[str]) -> str:
    config, _ = read_config(folder)
    files = ModelFiles(folder.name, folder, config, weight_files(folder), units.layers, None)
    dense = _dense_units(units, quantized)
    protected = f", 16 bit: {', '.join(dense)}" if dense else ""
    return f"checkpoint {checkpoint.layout} sha256 {model_sha256(files)}{protected}"
