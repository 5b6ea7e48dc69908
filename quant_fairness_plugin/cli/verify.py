"""`quant-fairness verify DIR`: does this checkpoint hold what it says, and which readers read it right?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.cli.options import Json
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.export.verify import VerifyReport
from quant_fairness_plugin.export.verify import verify as verify_folder


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, ours or another tool's.")],
    reader: Annotated[
        str | None,
        typer.Option(help="Reader to run and compare: transformers, vllm or gptqmodel. Default: what can be run here."),
    ] = None,
    reader_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of the reader's own environment. Default: this one, else QUANT_FAIRNESS_VLLM_PYTHON or "
            "QUANT_FAIRNESS_GPTQMODEL_PYTHON."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check checksums, headers, metadata and tensors, each reader's rules, and a real reader's numbers."""
    report = verify_folder(folder, reader=reader, python=reader_python)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    for check in report.checks:
        say(f"{check.name:<12} {check.outcome:<8} {check.detail}", indent=22)
    show_readers(report)


def show_readers(report: VerifyReport) -> None:
    """Print a line for each reader: whether its rules take this folder right."""
    for reader, problem in report.problems.items():
        note = f" ({report.notes[reader]})" if report.notes.get(reader) else ""
        said = f"{problem or 'every module as it is stored'}{note}"
        say(f"{reader:<12} {'no' if problem else 'reads':<8} {said}", indent=22)
