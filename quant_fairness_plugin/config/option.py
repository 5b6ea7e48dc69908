"""How a field of a configuration appears on the command line, declared beside the field. Knows no parser library."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

Panel = Literal["Model", "What to sweep", "What to protect", "How to quantize", "Texts", "Output", "More"]
"""The boxes of `--help`."""
PANELS: tuple[Panel, ...] = get_args(Panel)


@dataclass(frozen=True, slots=True)
class Option:
    """A command-line option for a field of a dataclass, as `Annotated[int, Option("What it does.", "More")]`."""

    help: str
    """A sentence. Where it ends with a colon, the names that the field accepts are added to it."""
    panel: Panel
    flag: str | None = None
    """The option's name where it is not the field's with dashes: `--langs`, or `--sym/--asym` for a switch."""
    parse: Callable[[str], Any] | None = None
    """Text → value, where the field is no plain number, name, path or switch. Raises `ConfigError`."""
    metavar: str | None = None
    """What stands for the value in `--help`."""
    names: Collection[str] = ()
    """Values to complete at the prompt, such as a registry; those of a `Literal` are known from the type."""
    minimum: int | None = None
