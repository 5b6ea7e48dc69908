"""Whether a checkpoint folder can be the quantized side of a model's sweep, as far as files tell it. No torch.

What only the tensors tell (the same embeddings, folded scales) `checkpoint_bank` checks once the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.folder import (
    RECORD,
    check_headers,
    load_record,
    packed_modules,
    read_config,
    read_quantization,
)
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256, tensor_shapes

_LAYER_KEYS = ("num_hidden_layers", "n_layer")


_HINT = "A bank is a checkpoint that was quantized from the very model that is swept."


def check_bank(folder: Path, files: ModelFiles, grid: Grid) -> None:
    """Refuse a folder that is not a quantized checkpoint of this model on the sweep's grid.

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
        raise ArtifactError(f"--bank {folder}: no such folder; give the folder of a quantized checkpoint")
    config, _ = read_config(folder)
    quantization, source = read_quantization(folder)
    if not quantization:
        raise ConfigError(
            f"--bank {folder}: not quantized ({source} has no quantization_config); give a GPTQ, AWQ or "
            "compressed-tensors checkpoint, or leave --bank out to round to nearest"
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
    """Return the grid of a checkpoint, by its metadata; of several group sizes the largest, as a model's grid has it.

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
    if len({replace(grid, group_size=-1) for grid in grids}) != 1:
        grids_in_words = ", ".join(sorted(_words(grid) for grid in grids)) or "none that is read here"
        raise UnsupportedModelError(
            f"--bank {folder}: {len(grids)} grids ({grids_in_words}); a bank has one. Use a checkpoint of one grid."
        )
    return max(grids, key=lambda grid: grid.group_size)


def _grids(quantization: Mapping[str, Any]) -> Iterator[Grid]:
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        for group in (quantization.get("config_groups") or {}).values():
            weights = group["weights"]
            if weights.get("type", "int") != "int":
                raise UnsupportedModelError(
                    f"--bank: its weights are {group.get('format')}, and a bank has integers. Leave --bank out: sweep "
                    "--scheme rounds to floats itself"
                )
            size = weights.get("group_size") or -1
            yield Grid(
                bits=int(weights["num_bits"]), group_size=int(size), symmetric=bool(weights.get("symmetric", True))
            )
    elif method in ("gptq", "awq"):
        symmetric = quantization.get("sym", True) if method == "gptq" else not quantization.get("zero_point", True)
        bits, size = int(quantization["bits"]), int(quantization["group_size"])
        yield Grid(bits=bits, group_size=size, symmetric=bool(symmetric))
        for rule, changes in (quantization.get("dynamic") or {}).items():
            if not rule.startswith("-:") and isinstance(changes, dict):
                yield Grid(
                    bits=int(changes.get("bits", bits)),
                    group_size=int(changes.get("group_size", size)),
                    symmetric=bool(changes.get("sym", symmetric)),
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
            f"--bank {folder}: {outside[0]} is quantized, and lies outside of the decoder blocks; use a "
            "checkpoint that quantizes blocks only"
        )
    if not packed:
        raise ConfigError(f"--bank {folder}: holds no quantized module that can be read. {_HINT}")
