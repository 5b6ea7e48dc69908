"""`quant-fairness cite`: BibTeX of the works that this library builds on."""

from __future__ import annotations

from typing import Annotated

import typer

from quant_fairness_plugin.claims.references import cited, references


def cite(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Which; all where none is named.")
    ] = None,
    list_keys: Annotated[
        bool, typer.Option("--keys", help="Print the keys alone, on one line.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Print the works that this library builds on, as BibTeX: the research behind it, ACIQ, GPTQ, AWQ and others."""
    chosen = cited(keys or ())
    typer.echo(" ".join(keys or references()) if list_keys else "\n\n".join(chosen))
