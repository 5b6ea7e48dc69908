"""`quant-fairness measure`: a model alone (baseline and language support), or a checkpoint against its 16-bit model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import Measurement, Part, save, save_run_record, to_json
from quant_fairness_plugin.checkpoint.original import check_original
from quant_fairness_plugin.checkpoint.others import readable_folder
from quant_fairness_plugin.cli.answers import show_answers
from quant_fairness_plugin.cli.damage import (
    baseline_table,
    damage_notes,
    damage_table,
    detailed_damage_table,
    language_notes,
    show_notes,
)
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.legacy import HowMeasured, check_legacy, legacy_measure
from quant_fairness_plugin.cli.options import COMPUTE, TEXTS, Access, ModelOption, OutputFile, Place, Shown
from quant_fairness_plugin.cli.original import base_model
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import describe_original, describe_part, show
from quant_fairness_plugin.cli.verdict import check_gate, show_verdict
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.preflight import preflight


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToMeasure:
    """On which sentences, and by which measurement."""

    part: Annotated[Part, Option("Sentences to measure on:", "Texts")] = "confirm"
    method: HowMeasured = "rigorous"


@options(config=(*TEXTS, *COMPUTE, "gate", "prompts"))
def measure(
    config: FairConfig,
    access: Access,
    place: Place,
    how: HowToMeasure,
    shown: Shown,
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A checkpoint folder of any tool, or a .gguf file.")
    ] = None,
    model: ModelOption = None,
    output: OutputFile = None,
) -> None:
    """Measure what quantization did to each language: checkpoint DIR against the 16-bit model that it came from.

    Without DIR, the 16-bit model alone.
    """
    source, budget = access.source(_base_model(checkpoint, model)), place.bytes_
    if how.method == "legacy":
        check_legacy(config, part=how.part != "confirm")
        if checkpoint is not None:
            checkpoint = readable_folder(checkpoint)
            check_original(checkpoint, source.resolve())
        legacy_measure(source, config, checkpoint=checkpoint, output=output, as_json=shown.as_json)
        return
    checked = preflight(source, config)
    folder = None if checkpoint is None else _checkpoint_of(checked.files, checkpoint)

    # Loads torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.forecast.room import say_where_short
    from quant_fairness_plugin.quantize.workplace import Workplace

    started = time.monotonic()
    say_where_short("measure", *checked, config, budget=budget, trust_remote_code=source.trust_remote_code)
    with progress(place.kept) as tell:
        quantizer = FairQuantizer.from_source(
            source, config, checked=checked, progress=tell, place=Workplace(place.work, budget), stream=True
        )
        if folder is None:
            measured = quantizer.measure(part=how.part).measurements[BASELINE]
        else:
            measured = quantizer.measure_folder(folder, part=how.part)
    if output is not None:
        save(measured, output)
        save_run_record(output, seconds=time.monotonic() - started, device=measured.provenance.device, argv=sys.argv)
    if shown.as_json:
        typer.echo(to_json(measured), nl=False)
    elif checkpoint is None:
        show(baseline_table(measured, title=f"{source.name}, 16 bit: {_sentences(measured)}"))
        show_notes(language_notes(measured))
    else:
        show_verdict(measured, config)
        table = detailed_damage_table if shown.details else damage_table
        original = describe_original(measured, source.name)
        show(table(measured, title=f"{checkpoint} {original}: {_sentences(measured)}"))
        show_notes(damage_notes(measured))
        show_answers(measured, details=shown.details)
    if checkpoint is not None:
        check_gate(measured, config)


def _checkpoint_of(files: ModelFiles, checkpoint: Path) -> Path:
    """Return the folder that is measured, which was made from these files as far as its record says."""
    folder = readable_folder(checkpoint)
    check_original(folder, files)
    return folder


def _sentences(measured: Measurement) -> str:
    return f"{describe_part(measured)} of {measured.provenance.text_set}"


def _base_model(checkpoint: Path | None, model: str | None) -> str:
    """Return the 16-bit model: the one given, else the one that the checkpoint's record names."""
    if model:
        return model
    if checkpoint is None:
        raise ConfigError("nothing to measure; give a checkpoint folder, or a model with --model, such as --model demo")
    return base_model(checkpoint)
