"""Step 7 back to step 4: a quantized checkpoint as the bank that a sweep takes its quantized weights from."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, precision_of_bits
from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE
from quant_fairness_plugin.checkpoint.dequantize import Checkpoint, open_checkpoint
from quant_fairness_plugin.checkpoint.folder import (
    RECORD,
    check_headers,
    load_record,
    packed_modules,
    read_config,
    read_quantization,
    weight_files,
)
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256, tensor_shapes
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import CheckpointBank
from quant_fairness_plugin.sweep.jobs import BankRecipe

_logger = logging.getLogger(__name__)


def bank_recipe(folder: Path, grid: Grid) -> BankRecipe:
    """What opens the bank, here or in a worker process."""
    return partial(open_bank, folder=folder.resolve(), grid=grid)


def open_bank(loaded: LoadedModel, units: UnitMap, *, folder: Path, grid: Grid) -> CheckpointBank:
    """The bank of a checkpoint folder, ours or another tool's. Weights are read when a unit is first asked for.

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
            "cannot single out; allowed are checkpoints without. Export one with --protect-columns 0."
        )
    checkpoint = open_checkpoint(folder)
    quantized = {f"{module}.weight": partial(_dense, loaded, checkpoint, module) for module in checkpoint.packed}
    for name in quantized:
        _check_parameter(folder, loaded, name)
    bank = CheckpointBank(
        units,
        precision=precision_of_bits(checkpoint_grid(folder, read_quantization(folder)[0]).bits),
        quantized=quantized,
        folded=dict(_folded(folder, loaded, checkpoint)),
        description=_description(folder, checkpoint, units, set(quantized)),
        recipe=bank_recipe(folder, grid),
    )
    kept = _kept(units, set(quantized))
    if kept:
        _logger.warning("bank %s: in 16 bit in every plan, as in the checkpoint: %s", folder, ", ".join(kept))
    return bank


def _dense(loaded: LoadedModel, checkpoint: Checkpoint, module: str) -> Tensor:
    """A quantized module's weight as the model stores it."""
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
        name = loaded.family.architecture.loaded_name(stored)
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


def _kept(units: UnitMap, quantized: set[str]) -> list[str]:
    """Layers, and fusion groups of other layers, that the checkpoint holds in 16 bit: `0`, `3.down`."""
    found: list[str] = []
    for layer in range(units.layers):
        names = [f"layers.{layer}.{group}" for group in units.groups]
        kept = [name for name in names if quantized.isdisjoint(units.parameters[name])]
        whole = [f"layers.{layer}"] if len(kept) == len(names) else kept
        found += [name.removeprefix("layers.") for name in whole]
    return found


def _description(folder: Path, checkpoint: Checkpoint, units: UnitMap, quantized: set[str]) -> str:
    config, _ = read_config(folder)
    files = ModelFiles(folder.name, folder, config, weight_files(folder), units.layers, None)
    kept = _kept(units, quantized)
    protected = f", 16 bit: {', '.join(kept)}" if kept else ""
    return f"checkpoint {checkpoint.layout} sha256 {model_sha256(files)}{protected}"


_LAYER_KEYS = ("num_hidden_layers", "n_layer")


_HINT = "A bank is a checkpoint that was quantized from the very model that is swept."


def check_bank(folder: Path, files: ModelFiles, grid: Grid) -> None:
    """Refuse a folder that is no quantized checkpoint of this model on the sweep's grid.

    Args:
        folder: the checkpoint.
        files: the 16-bit model that is swept.
        grid: the sweep's grid; its clipping rule does not matter.

    Raises:
        ArtifactError: no folder, or files that are missing or malformed.
        ConfigError: a checkpoint of another model, in 16 bit, or on another grid.
        UnsupportedModelError: a quantization method that is not read, or several widths in one checkpoint.
    """
    if not folder.is_dir():
        raise ArtifactError(f"--bank {folder}: no such folder; allowed is a quantized checkpoint. Check the path.")
    config, _ = read_config(folder)
    quantization, source = read_quantization(folder)
    if not quantization:
        raise ConfigError(
            f"--bank {folder}: not quantized ({source} has no quantization_config); allowed are GPTQ, AWQ and "
            "compressed-tensors checkpoints. Name one, or leave --bank out to round to nearest."
        )
    stored = checkpoint_grid(folder, quantization)
    if stored != replace(grid, clip=stored.clip):
        raise ConfigError(
            f"--bank {folder}: its grid is {_words(stored)}, the sweep's is {_words(grid)}; they must be the same. "
            f"Pass --bits {stored.bits} --group-size {stored.group_size} {'--sym' if stored.symmetric else '--asym'}."
        )
    _check_model(folder, config, files)
    _check_shapes(folder, quantization, files)


def checkpoint_grid(folder: Path, quantization: Mapping[str, Any]) -> Grid:
    """The one grid of a checkpoint, by its metadata.

    Raises:
        UnsupportedModelError: several widths, or metadata of a method that is not read.
        ArtifactError: metadata without bits or group size.
    """
    try:
        grids = set(_grids(quantization))
    except (KeyError, TypeError, ValueError) as err:
        raise ArtifactError(
            f"{folder}: the quantization metadata does not say its grid ({type(err).__name__}: {err}). Export again."
        ) from err
    if len(grids) != 1:
        found = ", ".join(sorted(_words(grid) for grid in grids)) or "none that is read here"
        raise UnsupportedModelError(
            f"--bank {folder}: {len(grids)} grids ({found}); a bank has one. Use a checkpoint of one grid."
        )
    return grids.pop()


def _grids(quantization: Mapping[str, Any]) -> Iterator[Grid]:
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        for group in (quantization.get("config_groups") or {}).values():
            weights = group["weights"]
            size = weights.get("group_size") or -1
            yield Grid(
                bits=int(weights["num_bits"]), group_size=int(size), symmetric=bool(weights.get("symmetric", True))
            )
    elif method in ("gptq", "awq"):
        symmetric = quantization.get("sym", True) if method == "gptq" else not quantization.get("zero_point", True)
        bits, size = int(quantization["bits"]), int(quantization["group_size"])
        yield Grid(bits=bits, group_size=size, symmetric=bool(symmetric))
        for rule, own in (quantization.get("dynamic") or {}).items():
            if not rule.startswith("-:") and isinstance(own, dict):
                yield Grid(
                    bits=int(own.get("bits", bits)),
                    group_size=int(own.get("group_size", size)),
                    symmetric=bool(own.get("sym", symmetric)),
                )


def _words(grid: Grid) -> str:
    groups = "one scale a row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"int{grid.bits}, {groups}, {'symmetric' if grid.symmetric else 'with zero points'}"


def _check_model(folder: Path, config: Mapping[str, Any], files: ModelFiles) -> None:
    for key in ("model_type", *_LAYER_KEYS):
        if key in config and key in files.config and config[key] != files.config[key]:
            raise ConfigError(
                f"--bank {folder}: {key} is {config[key]!r}, that of {files.name} {files.config[key]!r}. {_HINT}"
            )
    if not (folder / RECORD).is_file():
        return
    made_from = load_record(folder).provenance
    if made_from.model_sha256 != model_sha256(files):
        raise ConfigError(
            f"--bank {folder}: its {RECORD} says that it was made from {made_from.model} with sha256 "
            f"{made_from.model_sha256[:12]}, and {files.name} has {model_sha256(files)[:12]}. {_HINT}"
        )


def _check_shapes(folder: Path, quantization: Mapping[str, Any], files: ModelFiles) -> None:
    """Tensors of the same name have the same shape, and what is quantized lies in the decoder blocks."""
    shapes, expected = check_headers(folder), tensor_shapes(files)
    for name, (_, shape) in shapes.items():
        if name in expected and expected[name][1] != shape:
            raise ConfigError(
                f"--bank {folder}: {name} is {list(shape)}, in {files.name} {list(expected[name][1])}. {_HINT}"
            )
    packed = packed_modules(shapes, quantization)
    outside = sorted(name for name in packed if not re.search(r"\.\d+\.", name))
    if outside:
        raise UnsupportedModelError(
            f"--bank {folder}: {outside[0]} is quantized, and lies outside of the decoder blocks; allowed are "
            "checkpoints that quantize blocks only. Use another."
        )
    if not packed:
        raise ConfigError(f"--bank {folder}: holds no quantized module that can be read. {_HINT}")
