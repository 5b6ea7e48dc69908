"""`awq-quantize MODEL --bits 4`: `quant-fairness quantize` with the method fixed and nothing protected by default.

The grid has zero points unless `--sym` asks for one without: AWQ's own layout, which every reader of it expects.
"""

from __future__ import annotations

import sys

import typer

from quant_fairness_plugin.cli.gptq_quantize import variant
from quant_fairness_plugin.cli.main import run_guarded
from quant_fairness_plugin.cli.quantize import quantize

command = variant(quantize, fixed={"method": "awq"}, defaults={"protect_layers": "none"})
command.__doc__ = "Quantize MODEL with AWQ, keep the given layers in 16 bit, verify and measure what was written."

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command("awq-quantize")(command)


def main() -> None:
    """Entry point of `awq-quantize`."""
    sys.exit(run_guarded(typer.main.get_command(app), sys.argv[1:], "awq-quantize"))
