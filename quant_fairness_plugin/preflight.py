"""Everything that can be known before torch is imported: a wrong argument fails in the first second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.checkpoint.readers import check_exportable
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError
from quant_fairness_plugin.export.staging import check_output
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.model.architectures import LAYOUTS
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.resolve import ModelFiles, resolve_model
from quant_fairness_plugin.quantize.backends import check_backend
from quant_fairness_plugin.quantize.grid_rules import check_clip
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
    check = partial(
        check_backend,
        config.backend,
        method=config.method,
        grid=config.grid,
        clip=config.clip,
        weighting=config.calibration,
    )
    check()
    find_objective(config.objective)
    if out is not None:
        check_output(out.resolve(), overwrite=overwrite)
        check_exportable(None, format=config.format, grid=config.grid, reader=config.reader, overrides=config.overrides)
    check_clip(config.grid, method=config.method, sweeps=config.protect_layers == "auto")
    files = resolve_model(
        source.name,
        revision=source.revision,
        allow_pickle=source.allow_pickle,
        trust_remote_code=source.trust_remote_code,
    )
    check(family=str(files.config.get("model_type", "")))
    if isinstance(config.protect_layers, tuple):
        check_layers(config.protect_layers, files.layers)
    check_units(config, units=known_units(str(files.config.get("model_type", ""))), layers=files.layers)
    if config.top is not None and not 1 <= config.top < files.layers:
        raise ConfigError(
            f"top {config.top} is not a number of layers; the model has {files.layers}, use 1..{files.layers - 1}"
        )
    texts = load_texts(config.texts, languages=config.languages, reference=config.reference)
    return files, texts


def known_units(model_type: str) -> tuple[str, ...] | None:
    """The names of a layer's units in models of this type; None where only the model itself can tell."""
    for layout in LAYOUTS:
        if model_type in layout.families:
            return tuple(unit.name for unit in layout.units)
    return None


def check_units(config: FairConfig, *, units: tuple[str, ...] | None, layers: int) -> None:
    """Check that the layers and units with a precision of their own are the model's.

    Args:
        config: the configuration.
        units: names of a layer's units, or None where they are not known yet.
        layers: how many layers the model has.

    Raises:
        InvalidLayerError: a layer that the model lacks, or a unit that its layers lack.
    """
    for name in config.overrides:
        layer, _, unit = name.removeprefix("layers.").partition(".")
        if int(layer) >= layers:
            raise InvalidLayerError(
                f"{name.removeprefix('layers.')}: layer {layer} does not exist: the model has {layers} layers, allowed "
                f"are 0..{layers - 1}. Layers are counted from 0; correct the list."
            )
        if unit and units is not None and unit not in units:
            raise InvalidLayerError(
                f"{layer}.{unit} is no unit of the model; its layers have {', '.join(units)}. Write for example "
                f"{layer}.{units[-1]}."
            )
