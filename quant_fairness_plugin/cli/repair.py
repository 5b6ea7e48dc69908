"""`quant-fairness repair DIR`: metadata that every reader takes right, for a folder that another tool wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quant_fairness_plugin.cli.options import Json
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import verified
from quant_fairness_plugin.cli.verify import show_readers
from quant_fairness_plugin.export.repair import RepairReport
from quant_fairness_plugin.export.repair import repair as repair_folder

SHOWN = 60
"""Characters of a value that are shown; --json shows all."""


def repair(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A gptq or awq folder of another tool.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. Default: DIR-repaired.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change DIR itself; keeps its metadata as *.before-repair.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    as_json: Json = False,
) -> None:
    """Make a folder of gptqmodel, AutoRound, AutoAWQ or AutoGPTQ load in Transformers, vLLM and gptqmodel."""
    report = repair_folder(folder, output, in_place=in_place, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
        return
    _show(report)


def _show(report: RepairReport) -> None:
    for change in report.changes:
        typer.echo(f"{change.file}: {change.key}: {_short(change.before)} → {_short(change.after)}")
    if not report.changes:
        typer.echo(f"{report.folder}: nothing to change")
    if report.backups:
        typer.echo(f"backups: {', '.join(report.backups)}")
    if report.verified is not None:
        show_readers(report.verified)
        say(verified(report.verified.reader_run))
        typer.echo(f"{report.out}: written, weights unchanged")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}… ({len(text)} characters)"
