"""Our own commands, run in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import typer


def printed(*line: str) -> str:
    """Return what a command prints; its errors are raised."""
    from quant_fairness_plugin.cli.main import app

    held = io.StringIO()
    with redirect_stdout(held):
        typer.main.get_command(app).main(list(line), prog_name="quant-fairness", standalone_mode=False)
    return held.getvalue()
