"""`quant-fairness run`: the main job, from a model to a verified checkpoint and a table per language."""

from __future__ import annotations

from pathlib import Path

import typer

from quant_fairness_plugin.artifacts import Measurement, to_json
from quant_fairness_plugin.artifacts.evidence import RunResult
from quant_fairness_plugin.checkpoint.formats import check_folder_format
from quant_fairness_plugin.cli.answers import show_answers
from quant_fairness_plugin.cli.damage import comparison_table, damage_notes, detailed_comparison_table, show_notes
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.line import opened_line
from quant_fairness_plugin.cli.options import Access, ModelOption, OutputFolder, Overwrite, Place, Shown, default_output
from quant_fairness_plugin.cli.report import read_next, report_checkpoint_folder
from quant_fairness_plugin.cli.saved_plan import PlanFile, planned
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import describe_part, extent, show, singled_out, verified
from quant_fairness_plugin.cli.verdict import check_gate, show_verdict
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.quantize.calibration import coverage_lines


@options()
def run(
    *,
    model: ModelOption = None,
    output: OutputFolder = None,
    overwrite: Overwrite = False,
    config: FairConfig,
    plan: PlanFile = None,
    access: Access,
    place: Place,
    shown: Shown,
) -> None:
    """Measure, score, plan, quantize, export, verify, and print each language's damage before and after."""
    saved, config = planned(plan, config)
    check_folder_format(config.format)
    source = access.source(model)
    out = output or default_output(source.name)
    with opened_line("run", source, config, out, plan=saved, overwrite=overwrite, place=place) as quantizer:

        def report(folder: Path, unprotected: Measurement, protected: Measurement) -> None:
            others = [other for other in (unprotected, quantizer.last_sweep) if other is not None]
            report_checkpoint_folder(folder, protected, quantizer.config, others)

        result = quantizer.run(out, overwrite=overwrite, report=report)
    typer.echo("\n".join(coverage_lines(result.record.calibration)), err=True)
    if shown.as_json:
        typer.echo(to_json(result.record), nl=False)
    else:
        _show(result, quantizer.config, out, details=shown.details)
    check_gate(result.protected, quantizer.config)


def _show(result: RunResult, config: FairConfig, out: Path, *, details: bool) -> None:
    show_verdict(result.protected, config)
    more, part = singled_out(result.plan), describe_part(result.protected)
    title = f"{config.method} {result.record.grids}, {part}: without protection, and with {more}"
    table = detailed_comparison_table if details else comparison_table
    show(table(result.unprotected, result.protected, title=title))
    show_notes(damage_notes(result.protected, changed=False))
    show_answers(result.protected, details=details)
    for reason in (*result.plan.reasons, result.verdict):
        say(reason)
    protection = f"{result.plan.overhead:.1%} extra bytes for protection"
    say(verified(result.record.reader_run))
    say(f"{out}: {result.record.format}; {protection}; {extent(result.record)}")
    say(read_next(result.record, out))
