"""Prose on a terminal: lines end between words. In a file or a pipe each stays one line."""

from __future__ import annotations

import textwrap

import typer
from rich.console import Console

_NARROWEST = 40
"""Columns of a terminal below which lines are left to it."""


def say(text: object, *, indent: int = 2, dim: bool = False, err: bool = False) -> None:
    """Print lines of prose, on a terminal wrapped to its width.

    Args:
        text: one line or several.
        indent: spaces in front of what a line goes on with.
        dim: in grey on a terminal.
        err: to stderr.
    """
    console = Console(stderr=err)
    lines = str(text).split("\n")
    if console.is_terminal and console.width >= _NARROWEST:
        lines = [wrapped(line, console.width, indent) for line in lines]
    typer.echo(typer.style("\n".join(lines), dim=True) if dim else "\n".join(lines), err=err)


def wrapped(line: str, width: int, indent: int = 2) -> str:
    """Return a line cut between words into lines of at most `width` characters; a longer word stays whole.

    >>> wrapped("Verified by a reader", 12).splitlines()
    ['Verified by', '  a reader']
    """
    if len(line) <= width:
        return line
    below = " " * indent
    return textwrap.fill(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
