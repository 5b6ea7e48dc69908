"""Checkpoints of other tools: where what is read of one lies, and what measuring its weights leaves out. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import RECORD_NAME
from quant_fairness_plugin.checkpoint.folder import read_quantization
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.gguf import SOURCE, gguf_folder

GGUF = ".gguf"


def readable_folder(path: Path) -> Path:
    """Return the folder of a checkpoint: itself, or the float32 values of a GGUF file, written once into a cache.

    Raises:
        ConfigError: nothing is there, or a file of another kind.
        MissingExtraError, UnsupportedModelError, ResourceError: as `gguf_folder`.
    """
    if path.is_file() and path.suffix == GGUF:
        return gguf_folder(path, dtype="float32")
    if not path.is_dir():
        problem = "is a file" if path.exists() else "is not there"
        raise ConfigError(
            f"{path} {problem}; accepted is a checkpoint folder, or a .gguf file. "
            "Name the folder that holds config.json"
        )
    return path


def weights_alone(folder: Path) -> str:
    """Return what a server would round beside the weights, as a sentence; empty where it rounds nothing else.

    Raises:
        ArtifactError: metadata that cannot be read.
    """
    quantization, _ = read_quantization(folder)
    # A checkpoint of ours keeps that file of its source, and is for other servers.
    if (folder / SOURCE).is_file() and not quantization and not (folder / RECORD_NAME).is_file():
        return "the weights alone: llama.cpp also rounds the inputs of its products to 8 bits"
    if any(_rounds_activations(quantization)):
        return "the weights alone: servers also round the activations of this checkpoint"
    return ""


def _rounds_activations(quantization: Mapping[str, Any]) -> Iterator[bool]:
    """Yield what says so: a scheme of activations of any group, or `fp8`, whose servers always do."""
    yield quantization.get("quant_method") == "fp8"
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        yield isinstance(group, Mapping) and bool(group.get("input_activations"))
