"""Text of the command line → values of `FairConfig`. What fits together is checked by the configuration itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, cast, get_args

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError
from quant_fairness_plugin.measure.objectives import one_of
from quant_fairness_plugin.quantize.grid_rules import check_bits, check_group_size


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas.

    >>> parse_names("3.down, 5.qkv")
    ('3.down', '5.qkv')
    """
    return tuple(name.strip() for name in text.split(","))


def parse_languages(text: str) -> tuple[str, ...]:
    """Return the languages in a list with commas. The text set is not known yet.

    Raises:
        ConfigError: an empty list or an empty name in it.
    """
    names = parse_names(text)
    if not all(names):
        raise ConfigError(
            f"--langs {text!r} holds an empty name; write languages with commas between, such as en,he,ar"
        )
    return names


def parse_reference(text: str) -> str | None:
    """Return the reference language, None for `none`."""
    return None if text.strip().lower() == "none" else text.strip()


def parse_protection(text: str) -> Literal["auto", "none"] | tuple[int, ...]:
    """Return `auto`, `none` or the layers in a list such as `0,9,11`. How many the model has is not known yet.

    Raises:
        InvalidLayerError: an empty list, another word, or a number that is no layer index.
    """
    match text.strip().lower():
        case "auto" | "none" as word:
            return word
    layers = _integers(text)
    if layers is None:
        raise InvalidLayerError(
            f"--protect-layers {text!r} is not a list of layer indices; use 'auto', 'none', or indices such as 0,9,11"
        )
    return layers


def parse_int8_layers(text: str) -> tuple[int, ...]:
    """Return the layers in a list such as `3,5`. How many the model has is not known yet.

    Raises:
        InvalidLayerError: an empty list, a word, or a number that is no layer index.
    """
    layers = _integers(text)
    if layers is None:
        raise InvalidLayerError(f"--int8-layers {text!r} is not a list of layer indices; use indices such as 3,5")
    return layers


def parse_share(text: str) -> float:
    """Return a share that is written as a percentage or a number. Its range is checked by the configuration.

    Raises:
        ConfigError: not a number.

    >>> parse_share("1%")
    0.01
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError as err:
        raise ConfigError(f"--protect-columns {text!r} is no share; use a percentage such as 1%, or 0.01") from err
    return value / 100 if text.strip().endswith("%") else value


def parse_bits(text: str) -> int:
    """Return a bit width, so that 3.5 gets our message and not a parser's.

    Raises:
        ConfigError: not an integer from 2 to 8.
    """
    value = _integer(text)
    check_bits(value)
    return int(value)


def parse_group_size(text: str) -> int | Literal["auto"]:
    """Return a group size, or `auto`.

    Raises:
        ConfigError: not one of auto, 32, 64, 128, -1.
    """
    if text.strip() == "auto":
        return "auto"
    value = _integer(text)
    check_group_size(value)
    return int(value)


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """Return the precisions in a list such as `fp16,int8`.

    Raises:
        ConfigError: a word that is no precision.
    """
    names, known = parse_names(text.lower()), get_args(Precision)
    if not set(names) <= set(known):
        raise ConfigError(f"--precisions {text!r}: write some of {', '.join(known)} with commas between")
    return cast(tuple[Precision, ...], names)


def choice(flag: str, names: Collection[str]) -> Callable[[str], str]:
    """Return the parser of an option that takes one of the names. Raises `ConfigError` for another one."""

    def parse(text: str) -> str:
        if text not in names:
            raise ConfigError(f"{flag} {text!r} is unknown; use {one_of(names)}")
        return text

    return parse


def _integer(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _integers(text: str) -> tuple[int, ...] | None:
    numbers = tuple(_integer(item) for item in text.split(","))
    return None if any(isinstance(number, str) for number in numbers) else cast(tuple[int, ...], numbers)
