"""`quantize --format gguf`: a model as one file for llama.cpp, planned for the bytes of that file, and measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quant_fairness_plugin.artifacts import Measurement, ProtectionPlan, to_json
from quant_fairness_plugin.cli.answers import show_answers
from quant_fairness_plugin.cli.damage import damage_notes, damage_table, detailed_damage_table, show_notes
from quant_fairness_plugin.cli.gguf import describe_gguf
from quant_fairness_plugin.cli.line import opened_line
from quant_fairness_plugin.cli.options import Place, Shown, default_output
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import describe_part, show, singled_out
from quant_fairness_plugin.cli.verdict import check_gate, show_verdict
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.model.gguf import check_readable
from quant_fairness_plugin.preflight import ModelSource

if TYPE_CHECKING:
    from quant_fairness_plugin.export.gguf import GgufReport


def quantize_to_gguf(
    source: ModelSource,
    config: FairConfig,
    output: Path | None,
    *,
    plan: ProtectionPlan | None,
    overwrite: bool,
    place: Place,
    shown: Shown,
) -> None:
    """Quantize, write the file, read it again, measure what it stands for, and print that.

    Raises:
        QualityGateError: the stated gate is not passed.
    """
    if config.like is None and Path(source.name).suffix == ".gguf":
        config = replace(config, like=source.name)
    out = output or default_output(source.name, ending=f"-int{config.bits}-fair.gguf")
    with opened_line("quantize", source, config, out, plan=plan, overwrite=overwrite, place=place) as quantizer:
        check_readable(quantizer.config.gguf_template())  # or what was written could not be measured
        report = quantizer.save_gguf(out, overwrite=overwrite)
        made, measured = quantizer.recommend(), quantizer.measure_folder()
    if shown.as_json:
        artifacts = {"plan": json.loads(to_json(made)), "measurement": json.loads(to_json(measured))}
        typer.echo(json.dumps({"file": asdict(report), **artifacts}, indent=1, ensure_ascii=False))
    else:
        _show(report, made, measured, config, details=shown.details)
    check_gate(measured, config)


def _show(
    report: GgufReport, plan: ProtectionPlan, measured: Measurement, config: FairConfig, *, details: bool
) -> None:
    show_verdict(measured, config)
    title = f"{report.path}: damage against the 16-bit model, {describe_part(measured)}"
    show((detailed_damage_table if details else damage_table)(measured, title=title))
    show_notes(damage_notes(measured))
    show_answers(measured, details=details)
    for reason in plan.reasons:
        say(reason)
    say(f"{config.method} {plan.grid}; {singled_out(plan)}")
    say(describe_gguf(report, measured=True))
