"""`gptq-quantize MODEL --bits 4 --protect-layers 0,9,11 --protect-biases`: the seeds' command.

It is `quant-fairness quantize` with the method fixed and nothing protected unless asked for.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from quant_fairness_plugin.cli.main import run_guarded
from quant_fairness_plugin.cli.quantize import quantize


def variant(command: Callable[..., None], *, fixed: dict[str, Any], defaults: dict[str, Any]) -> Callable[..., None]:
    """The same command without the `fixed` options, and with other `defaults`."""

    @wraps(command)
    def varied(*args: Any, **kwargs: Any) -> None:
        command(*args, **(kwargs | fixed))

    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name not in fixed
    ]
    varied.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    varied.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    varied.__doc__ = "Quantize MODEL with GPTQ, keep the given layers in 16 bit, verify and measure what was written."
    return varied


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command("gptq-quantize")(variant(quantize, fixed={"method": "gptq"}, defaults={"protect_layers": "none"}))


def main() -> None:
    """Entry point of `gptq-quantize`."""
    sys.exit(run_guarded(typer.main.get_command(app), sys.argv[1:], "gptq-quantize"))
