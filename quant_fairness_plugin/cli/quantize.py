"""`quant-fairness quantize`: one checkpoint, protected as the options say."""

from __future__ import annotations

from pathlib import Path

import typer

from quant_fairness_plugin.artifacts import ExportRecord, Measurement, ProtectionPlan, to_json
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.cli.answers import show_answers
from quant_fairness_plugin.cli.damage import damage_notes, damage_table, detailed_damage_table, show_notes
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.gguf_file import quantize_to_gguf
from quant_fairness_plugin.cli.line import opened_line
from quant_fairness_plugin.cli.options import (
    Access,
    ModelArgument,
    OutputFolder,
    Overwrite,
    Place,
    Shown,
    default_output,
)
from quant_fairness_plugin.cli.report import read_next, report_checkpoint_folder
from quant_fairness_plugin.cli.saved_plan import PlanFile, planned
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import describe_part, extent, show, singled_out, verified
from quant_fairness_plugin.cli.verdict import check_gate, show_verdict
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.quantize.calibration import coverage_lines


def quantize_model(
    *,
    model: ModelArgument,
    output: OutputFolder = None,
    overwrite: Overwrite = False,
    config: FairConfig,
    plan: PlanFile = None,
    access: Access,
    place: Place,
    shown: Shown,
) -> None:
    """Quantize MODEL, keep the protected layers in 16 bit, verify what was written and measure it."""
    saved, config = planned(plan, config)
    if checkpoint_format(config.format).one_file:
        return quantize_to_gguf(
            access.source(model), config, output, plan=saved, overwrite=overwrite, place=place, shown=shown
        )
    out = output or default_output(model)
    record = write_checkpoint(access.source(model), config, out, plan=saved, overwrite=overwrite, place=place)
    report_checkpoint(record, out, config, shown)


quantize = options()(quantize_model)


def write_checkpoint(
    source: ModelSource,
    config: FairConfig,
    out: Path,
    *,
    plan: ProtectionPlan | None = None,
    overwrite: bool,
    place: Place | None = None,
) -> ExportRecord:
    """Check what can be checked without torch, then quantize, export, verify and measure."""
    place = place or Place()
    with opened_line("quantize", source, config, out, plan=plan, overwrite=overwrite, place=place) as quantizer:

        def measure(folder: Path) -> Measurement:
            measured = quantizer.measure_folder(folder)
            others = [] if quantizer.last_sweep is None else [quantizer.last_sweep]
            report_checkpoint_folder(folder, measured, config, others)
            return measured

        return quantizer.save_pretrained(out, overwrite=overwrite, measure=measure)


def report_checkpoint(record: ExportRecord, out: Path, config: FairConfig, shown: Shown) -> None:
    """Print what was written: the record as JSON, or verdict, table and a line; its calibration on stderr.

    Raises:
        QualityGateError: the stated gate is not passed.
    """
    typer.echo("\n".join(coverage_lines(record.calibration)), err=True)
    if record.experts is not None:
        typer.echo("\n".join(record.experts.lines()), err=True)
    if shown.as_json:
        typer.echo(to_json(record), nl=False)
        return check_gate(record.measurement, config)
    if record.measurement is not None:
        show_verdict(record.measurement, config)
        title = f"{out}: damage against the 16-bit model, {describe_part(record.measurement)}"
        show((detailed_damage_table if shown.details else damage_table)(record.measurement, title=title))
        show_notes(damage_notes(record.measurement))
        show_answers(record.measurement, details=shown.details)
    more = singled_out(record.plan)
    say(verified(record.reader_run))
    say(f"{out}: {record.method} {record.grids}, {record.format}, {more}; {extent(record)}")
    say(read_next(record, out))
    check_gate(record.measurement, config)
