"""Everything that can be known before torch is imported: a wrong argument fails in the first second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.formats.support import check_format_grid
from quant_fairness_plugin.export.staging import check_output
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.resolve import ModelFiles, resolve_model
from quant_fairness_plugin.texts.load import load_texts


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from and what reading it may do."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def preflight(
    source: ModelSource, config: FairConfig, *, out: Path | None = None, overwrite: bool = False
) -> tuple[ModelFiles, TextSet]:
    """Resolve the model's files and the texts, and check the layer list and the output against them.

    Raises:
        QuantFairnessError: one of its kinds; nothing was loaded or written.
    """
    if out is not None:
        check_output(out.resolve(), overwrite=overwrite)
        check_format_grid(config.format, config.grid)
    files = resolve_model(
        source.name,
        revision=source.revision,
        allow_pickle=source.allow_pickle,
        trust_remote_code=source.trust_remote_code,
    )
    if isinstance(config.protect_layers, tuple):
        check_layers(config.protect_layers, files.layers)
    if config.top is not None and not 1 <= config.top < files.layers:
        raise ConfigError(
            f"top {config.top} is not a number of layers; the model has {files.layers}, use 1..{files.layers - 1}"
        )
    texts = load_texts(config.texts, languages=config.languages, reference=config.reference)
    return files, texts
