"""Our own commands, run in this process or in one of their own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout

import typer

ENTRY = "from quant_fairness_plugin.cli.main import main; main()"
"""What a Python of its own runs, with the command behind it."""


def printed(*line: str) -> str:
    """Return what a command prints; its errors are raised."""
    from quant_fairness_plugin.cli.main import app

    held = io.StringIO()
    with redirect_stdout(held):
        typer.main.get_command(app).main(list(line), prog_name="quant-fairness", standalone_mode=False)
    return held.getvalue()


def printed_apart(*line: str) -> str:
    """Return what a command prints in a process of its own, with one thread; its failure is raised."""
    command = [sys.executable, "-c", ENTRY, *line]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread()).stdout


def one_thread() -> dict[str, str]:
    """Return the environment of a process with one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1"}
