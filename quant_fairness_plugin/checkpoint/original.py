"""Whether a checkpoint was made from a given 16-bit model, as far as files tell. No torch.

Damage measured against another model is no damage: the record of a checkpoint holds the checksum of its original.
"""

from __future__ import annotations

import logging
from pathlib import Path

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.checkpoint.folder import RECORD, load_record, read_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256

_logger = logging.getLogger(__name__)

IN_MEMORY = "model in memory"
"""Among the arguments of a record: its checksum is that of parameters, which no file has."""
_SHAPE_KEYS = (
    "model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "intermediate_size", "n_inner",
    "num_attention_heads", "n_head", "num_key_value_heads",
)  # fmt: skip
"""Keys of config.json that quantization does not change."""


def check_original(folder: Path, files: ModelFiles) -> bool:
    """Return whether the checksum of a checkpoint's original was compared, and is that of this model.

    It cannot be compared without a record, or where one of the two was in memory; the log then says so.

    Args:
        folder: the checkpoint.
        files: the 16-bit model that it is measured against.

    Raises:
        ConfigError: the checkpoint was made from another model; names both.
        ArtifactError: a config or record that cannot be read.
    """
    record = recorded(folder)
    origin = "another model" if record is None else record.provenance.model
    config, _ = read_config(folder)
    for key in _SHAPE_KEYS:
        if key in config and key in files.config and config[key] != files.config[key]:
            raise ConfigError(
                f"{folder} was made from {origin}, not from {files.name}: {key} is {config[key]!r} in the one and "
                f"{files.config[key]!r} in the other. Name the original with --model"
            )
    if record is None:
        _logger.warning("%s has no %s: whether it was made from %s is not known", folder, RECORD, files.name)
        return False
    made_from, here = record.provenance.model_sha256, model_sha256(files)
    if made_from == here:
        return True
    if record.provenance.arguments.get(IN_MEMORY) or files.memory_sha256 is not None:
        _logger.warning(
            "%s: the checksum of its original, %s, cannot be compared with that of %s, as one of them was in memory",
            folder, origin, files.name,
        )  # fmt: skip
        return False
    raise ConfigError(
        f"{folder} was made from {origin} with sha256 {made_from[:12]}, and {files.name} has {here[:12]}: it is not "
        "the model that was quantized, its weights or config differ. Name the original with --model"
    )


def recorded(folder: Path) -> ExportRecord | None:
    """Return the record of a checkpoint folder; None where it has none, as those of other tools.

    Raises:
        ArtifactError: no such folder, or a record that does not fit.
    """
    return load_record(folder) if (folder / RECORD).is_file() or not folder.is_dir() else None
