"""`awq-quantize MODEL --bits 4`: `quant-fairness quantize` with the method fixed and nothing protected by default.

The grid has zero points unless `--sym` asks for one without: AWQ's own layout, which every reader of it expects.
"""

from __future__ import annotations

import sys

import typer

from quant_fairness_plugin.cli.declare import PanelCommand, options
from quant_fairness_plugin.cli.main import run_guarded
from quant_fairness_plugin.cli.quantize import quantize_model

EXAMPLE = "awq-quantize demo -o demo-awq --format awq"

command = options(
    fixed={"method": "awq"},
    defaults={"protect_layers": "none"},
    doc="Quantize MODEL with AWQ, keep the given layers in 16 bit, verify and measure what was written.",
)(quantize_model)
app = typer.Typer(pretty_exceptions_enable=False)
app.command("awq-quantize", cls=PanelCommand, epilog=f"Example: {EXAMPLE}")(command)


def main() -> None:
    """Entry point of `awq-quantize`."""
    sys.exit(run_guarded(typer.main.get_command(app), sys.argv[1:], "awq-quantize"))
