"""`quant-fairness verify DIR`: does this checkpoint hold what its record says, and does a reader read it right?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.cli.options import Json
from quant_fairness_plugin.export.verify import verify as verify_folder


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder that this tool wrote.")],
    reader: Annotated[
        str | None,
        typer.Option(help="Reader whose logits are compared: transformers or vllm. Default: what can be run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check sizes, checksums, headers, metadata and tensors, then compare a real reader's logits with our own."""
    report = verify_folder(folder, reader=reader)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    for check in report.checks:
        typer.echo(f"{check.name:<10} {check.outcome:<8} {check.detail}")
