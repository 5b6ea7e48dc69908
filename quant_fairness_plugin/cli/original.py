"""Which 16-bit model a checkpoint is measured against, where the command line does not say."""

from __future__ import annotations

from pathlib import Path

from quant_fairness_plugin.artifacts import RECORD_NAME, ExportRecord, load
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.resolve import BUNDLED


def base_model(checkpoint: Path) -> str:
    """Return the name of the original in a checkpoint's record.

    Raises:
        ConfigError: a checkpoint without a record, as other tools write them, or one made from a local folder.
        ArtifactError: a record that cannot be read.
    """
    if checkpoint.exists() and not (checkpoint / RECORD_NAME).is_file():
        raise ConfigError(
            f"{checkpoint} has no {RECORD_NAME}, so nothing says what it was made from; name the 16-bit model with "
            "--model"
        )
    base = load(ExportRecord, checkpoint / RECORD_NAME).provenance.model
    if base not in BUNDLED and "/" not in base:
        raise ConfigError(
            f"{checkpoint} was made from a local folder named {base!r}; say where it is with --model FOLDER"
        )
    return base
