"""`--method legacy` of `measure`, `sweep` and `recommend`: the research scripts' measurement and output.

Only the model, the texts, the languages and the reference count; any other option is refused, as it would do nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from quant_fairness_plugin.artifacts import Undefined, write_atomically
from quant_fairness_plugin.cli.tables import layer_list, show
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.preflight import ModelSource

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel
    from quant_fairness_plugin.seeds.legacy import LegacyMeasurement

HowMeasured = Annotated[
    Literal["rigorous", "legacy"],
    Option("With intervals, or as the research scripts did, on one sentence a language without any:", "Texts"),
]
_FREE = ("texts", "languages", "reference", "seed")


def check_legacy(config: FairConfig, **given: object) -> None:
    """Refuse what `--method legacy` would ignore.

    Args:
        config: the configuration.
        **given: further options by name; what is true was given.

    Raises:
        ConfigError: names them.
    """
    default = FairConfig()
    counted = [field.name for field in fields(config) if field.name not in _FREE]
    changed = [name for name in counted if getattr(config, name) != getattr(default, name)]
    others = [name.replace("_", " ") for name in (*changed, *(name for name, value in given.items() if value))]
    if others:
        raise ConfigError(
            f"--method legacy measures as the research scripts do, so it takes a model, texts, languages and a "
            f"reference, and not: {', '.join(others)}. Leave that out, or --method legacy"
        )


def legacy_measure(
    source: ModelSource, config: FairConfig, *, checkpoint: Path | None, output: Path | None, as_json: bool
) -> None:
    """Print perplexities and all of the scripts' disparities, each with its formula."""
    loaded, texts = _load(source, config)
    from quant_fairness_plugin.seeds.legacy import measure_legacy

    measured = measure_legacy(loaded, texts, str(config.reference), checkpoint)
    if not _written(asdict(measured), output, as_json=as_json):
        _show(measured)


def legacy_sweep(source: ModelSource, config: FairConfig, *, output: Path | None, as_json: bool) -> None:
    """Print the scripts' sweep: everything quantized but one layer, the lowest disparity first."""
    loaded, texts = _load(source, config)
    from quant_fairness_plugin.seeds.sweeps import layer_sweep

    rows = layer_sweep(loaded.model, loaded.tokenizer, texts, method="legacy", reference_lang=str(config.reference))
    assert isinstance(rows, tuple)
    if not _written({"model": loaded.files.name, "layers": [asdict(row) for row in rows]}, output, as_json=as_json):
        table = Table("layer", "D1", *texts, title=f"{loaded.files.name}, one layer kept: percent change of perplexity")
        for row in rows:
            table.add_row(str(row.layer), _text(row.disparity), *(f"{row.degradation[name]:.1f}" for name in texts))
        show(table)


def legacy_recommend(source: ModelSource, config: FairConfig, top: int, *, output: Path | None, as_json: bool) -> None:
    """Print the indices of the layers with the lowest disparity, as the scripts' `recommend` does."""
    loaded, texts = _load(source, config)
    from quant_fairness_plugin.seeds.sweeps import quick_sweep

    layers = quick_sweep(
        loaded.model, loaded.tokenizer, texts, top, method="legacy", reference_lang=str(config.reference)
    )
    if not _written({"model": loaded.files.name, "layers": layers}, output, as_json=as_json):
        typer.echo(layer_list(layers))


def _load(source: ModelSource, config: FairConfig) -> tuple[LoadedModel, dict[str, str]]:
    files = source.resolve()
    # Loads torch.
    import torch

    from quant_fairness_plugin.model.devices import find_device
    from quant_fairness_plugin.model.load import load_model
    from quant_fairness_plugin.seeds.legacy import legacy_texts

    texts = legacy_texts(config)
    # As the scripts did: on the CPU in float32, unless another device or dtype is named.
    loaded = load_model(
        files,
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        device="cpu" if config.device == "auto" else find_device(config.device),
        trust_remote_code=source.trust_remote_code,
        sentences=tuple(texts.values()),
    )
    return loaded, texts


def _written(document: Mapping[str, Any], output: Path | None, *, as_json: bool) -> bool:
    """Save the document where it is wanted; return whether it was printed, too."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    if output is not None:
        write_atomically(output, text.encode())
    if as_json:
        typer.echo(text, nl=False)
    return as_json


def _show(measured: LegacyMeasurement) -> None:
    title = f"{measured.model}, {measured.quantized}: one sentence a language, no intervals"
    table = Table("language", "script", "perplexity before", "after", "percent", "relative", "label", title=title)
    for row in measured.languages:
        figures = map(_text, (row.before, row.after, row.degradation, row.relative))
        table.add_row(row.language, row.script, *figures, row.label)
    show(table)
    table = Table("disparity", "value", "formula", title=f"by the research scripts, reference {measured.reference}")
    for figure in measured.disparities:
        table.add_row(figure.name, _text(figure.value), figure.formula)
    show(table)


def _text(value: float | Undefined) -> str:
    return f"undefined: {value.undefined}" if isinstance(value, Undefined) else f"{value:.4g}"
