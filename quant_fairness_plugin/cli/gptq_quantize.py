"""`gptq-quantize MODEL --bits 4 --protect-layers 0,9,11 --protect-biases`: the research scripts' command.

It is `quant-fairness quantize` with the method fixed and nothing protected by default.
"""

from __future__ import annotations

import sys

import typer

from quant_fairness_plugin.cli.declare import PanelCommand, options
from quant_fairness_plugin.cli.main import run_guarded
from quant_fairness_plugin.cli.quantize import quantize_model

EXAMPLE = "gptq-quantize demo -o demo-int4 --bits 4 --protect-layers 0,9,11"

command = options(
    fixed={"method": "gptq"},
    defaults={"protect_layers": "none"},
    doc="Quantize MODEL with GPTQ, keep the given layers in 16 bit, verify and measure what was written.",
)(quantize_model)
app = typer.Typer(pretty_exceptions_enable=False)
app.command("gptq-quantize", cls=PanelCommand, epilog=f"Example: {EXAMPLE}")(command)


def main() -> None:
    """Entry point of `gptq-quantize`."""
    sys.exit(run_guarded(typer.main.get_command(app), sys.argv[1:], "gptq-quantize"))
