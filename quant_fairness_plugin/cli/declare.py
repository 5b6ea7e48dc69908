"""Commands from functions: one option for each declared field of the records that a function takes.

A record is a dataclass whose fields carry an `Option`; a plain parameter may carry one, too. `@options(…)` gives a
command function the signature that typer reads, and calls it with the records filled. Of `FairConfig`, an option that
was typed goes before the `--config` file, the file before the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperOption

from quant_fairness_plugin.cli.config_file import read_config_file
from quant_fairness_plugin.cli.field import Declared, declare, declared_fields, parse_typed
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.config.option import PANELS
from quant_fairness_plugin.errors import ConfigError

Function = Callable[..., None]
_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_FILE = inspect.Parameter(
    "config_file",
    _BY_NAME,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings from NAME.yaml or NAME.json, such as protect_layers: [0, 9]; options typed here win.",
            rich_help_panel="More",
        ),
    ],
)


class Argument(Protocol):
    """One argument of a command function, made of the options of a command line."""

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield its options, as typer reads them from a signature."""
        ...

    def read(self, typed: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """Return its value: from the options that were typed, or from all, where typer knows the default."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigArgument:
    """The configuration, with the fields that a command takes and what it changes in them."""

    only: Sequence[str] | None
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    file: bool

    def options(self) -> dict[str, Declared]:
        """Return the options by the names of their fields."""
        every = declared_fields(FairConfig)
        return {name: every[name] for name in (self.only or every) if name not in self.fixed}

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield `--config` and the options."""
        if self.file:
            yield _FILE
        for each in self.options().values():
            yield each.parameter(self.defaults.get(each.name, each.default))

    def read(self, typed: Mapping[str, Any], values: Mapping[str, Any]) -> FairConfig:
        """Return the configuration: what was typed before the file, the file before the defaults.

        Raises:
            ConfigError: a bad value, or a file that says something else than what the command decides.
        """
        path = values.get("config_file")
        stored = {} if path is None else read_config_file(path)
        for name, value in self.fixed.items():
            if stored.get(name, value) != value:
                raise ConfigError(f"{path}: {name} {stored[name]!r}, but this command has {value!r}; leave {name} out")
        return make_config(**{**self.defaults, **stored, **parse_typed(self.options(), typed), **self.fixed})


@dataclass(frozen=True, slots=True)
class RecordArgument:
    """Another record."""

    record: type

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield an option for each field."""
        return (each.parameter(each.default) for each in declared_fields(self.record).values())

    def read(self, typed: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """Return the record; what was not typed has its default."""
        return self.record(**parse_typed(declared_fields(self.record), typed))


@dataclass(frozen=True, slots=True)
class OptionArgument:
    """A parameter that carries an `Option` itself."""

    declared: Declared

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the option."""
        yield self.declared.parameter(self.declared.default)

    def read(self, typed: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """Return what was typed, or the default."""
        name = self.declared.name
        return self.declared.parse(typed[name]) if name in typed else self.declared.default


@dataclass(frozen=True, slots=True)
class PlainArgument:
    """A parameter that typer reads as it is."""

    parameter: inspect.Parameter

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the parameter."""
        yield self.parameter.replace(kind=_BY_NAME)

    def read(self, typed: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        """Return typer's value."""
        return values[self.parameter.name]


def options(
    *,
    config: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    file: bool = True,
    doc: str | None = None,
) -> Callable[[Function], Function]:
    """Return a decorator that turns a function of records and plain parameters into a command for typer.

    Args:
        config: fields of `FairConfig` that are options; None for all.
        defaults: other defaults than the class's.
        fixed: fields of `FairConfig` that the command decides itself; they are no options.
        file: whether the command has `--config`.
        doc: help in place of the function's docstring.
    """
    rules = ConfigArgument(only=config, defaults=defaults or {}, fixed=fixed or {}, file=file)

    def decorate(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        arguments = {
            name: _argument(parameter.replace(annotation=hints[name]), rules)
            for name, parameter in inspect.signature(function).parameters.items()
        }

        @wraps(function)
        def command(ctx: typer.Context, **values: Any) -> None:
            typed = {name: value for name, value in values.items() if _was_typed(ctx, name)}
            function(**{name: argument.read(typed, values) for name, argument in arguments.items()})

        every = [parameter for argument in arguments.values() for parameter in argument.parameters()]
        context = inspect.Parameter("ctx", _BY_NAME, annotation=typer.Context)
        signature = inspect.Signature([context, *sorted(every, key=_place)])
        command.__signature__ = signature  # type: ignore[attr-defined] # typer reads it
        command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
        command.__doc__ = doc or function.__doc__
        return command

    return decorate


class PanelCommand(TyperCommand):
    """A command whose `--help` and completion options stand in the last box, and whose switches take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters as `--help` shows them."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if isinstance(parameter, TyperOption) and parameter.is_flag:
                parameter.metavar = ""
                if parameter.name in ("help", "install_completion", "show_completion"):
                    parameter.rich_help_panel = PANELS[-1]
        return parameters


def _argument(parameter: inspect.Parameter, config: ConfigArgument) -> Argument:
    if parameter.annotation is FairConfig:
        return config
    if declared_fields(parameter.annotation):
        return RecordArgument(parameter.annotation)
    declared = declare(parameter.name, parameter.annotation, parameter.default)
    return PlainArgument(parameter) if declared is None else OptionArgument(declared)


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _place(parameter: inspect.Parameter) -> int:
    """Return where the parameter's box stands; arguments come first."""
    panel = get_args(parameter.annotation)[-1].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else -1
