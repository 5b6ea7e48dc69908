"""A declared field as an option of typer."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from quant_fairness_plugin.checkpoint.formats import FILES, FORMATS
from quant_fairness_plugin.checkpoint.readers import READERS
from quant_fairness_plugin.cli.completion import complete
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import choice
from quant_fairness_plugin.measure.objectives import one_of

REGISTRIES: dict[str, Collection[str]] = {"format": [*FORMATS, *FILES], "reader": READERS}
"""Names that fields of `FairConfig` accept and that lie above it."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A field of a record, or a parameter of a command, that carries an `Option`."""

    name: str
    option: Option
    type_: Any
    """Without `Annotated`; may be `X | None`."""
    default: Any

    @property
    def accepted(self) -> tuple[str, ...]:
        """Return all that the field accepts, where its type is a `Literal`."""
        kinds = [kind for kind in (self.type_, *get_args(self.type_)) if get_origin(kind) is Literal]
        return get_args(kinds[0]) if kinds and self.option.parse is None else ()

    @property
    def names(self) -> Collection[str]:
        """Return the names that help lists and the shell completes."""
        return self.accepted or self.option.names or REGISTRIES.get(self.name, ())

    @property
    def flag(self) -> str:
        """Return the option's name on the command line."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    def parse(self, value: Any) -> Any:
        """Return what the field holds for what was typed.

        Raises:
            ConfigError: not one of the names that the field accepts, or what its parser refuses.
        """
        if self.option.parse is not None:
            return self.option.parse(value)
        if self.accepted:
            return choice(self.flag, self.accepted)(value)
        return value

    def parameter(self, default: Any) -> inspect.Parameter:
        """Return the option as typer reads it from a signature, with this default."""
        sentence, is_text = self.option.help, self.option.parse is not None or bool(self.accepted)
        info = typer.Option(
            self.flag,
            help=f"{sentence} {one_of(self.names)}." if sentence.endswith(":") else sentence,
            rich_help_panel=self.option.panel,
            metavar=self.option.metavar or ("NAME" if self.names else None),
            autocompletion=complete(self.name, self.names),
            min=self.option.minimum,
            show_default=not isinstance(default, bool),
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_as_text(default) if is_text else default,
            annotation=Annotated[str | None if is_text else self.type_, info],
        )


def declare(name: str, hint: Any, default: Any) -> Declared | None:
    """Return the option that an annotation carries; None where it carries none."""
    for option in getattr(hint, "__metadata__", ()):
        if isinstance(option, Option):
            return Declared(name, option, get_args(hint)[0], default)
    return None


def declared_fields(record: Any) -> dict[str, Declared]:
    """Return the options of a dataclass by the names of its fields; nothing for another type."""
    if not (isinstance(record, type) and is_dataclass(record)):
        return {}
    hints = get_type_hints(record, include_extras=True)
    every = [declare(field.name, hints[field.name], field.default) for field in fields(record)]
    return {each.name: each for each in every if each is not None}


def parse_typed(every: Mapping[str, Declared], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the options that were typed, and no others."""
    return {name: each.parse(typed[name]) for name, each in every.items() if name in typed}


def _as_text(value: Any) -> str | None:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or None
    return None if value is None else str(value)
