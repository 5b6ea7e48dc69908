"""Text of the command line → values of `FairConfig`. What fits together is checked by the configuration itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Literal, cast, get_args

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError
from quant_fairness_plugin.measure.objectives import additive_objectives, one_of
from quant_fairness_plugin.model.sizes import parse_size
from quant_fairness_plugin.quantize.grid_rules import check_bits, check_group_size
from quant_fairness_plugin.quantize.schemes import SCHEMES
from quant_fairness_plugin.texts.languages import normalise_language

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?(s|min|h)", re.ASCII)


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
    names, known = parse_names(text.lower()), [kind for kind in get_args(Precision) if kind not in SCHEMES]
    if not set(names) <= set(known):
        raise ConfigError(f"--precisions {text!r}: write some of {', '.join(known)} with commas between")
    return cast(tuple[Precision, ...], names)


def parse_max_size(text: str) -> int:
    """Return the bytes of a size such as `120MB`, `1.5 GiB` or `123456`.

    Raises:
        ConfigError: not a size.
    """
    return parse_size(text)


def parse_numbers(text: str, *, flag: str, example: str) -> dict[str, float]:
    """Return the number of each name in a list such as `en=1,fi=2`. Whether there are such languages is checked later.

    Raises:
        ConfigError: not NAME=NUMBER with commas between, no language, or one twice.

    >>> parse_numbers("en=1, fi=2", flag="--weights", example="en=1,fi=2")
    {'en': 1.0, 'fi': 2.0}
    """
    numbers: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            number = float(value)
        except ValueError as err:
            raise ConfigError(f"{flag} {text!r}: write LANGUAGE=NUMBER with commas between, such as {example}") from err
        language = normalise_language(name) if name else ""
        if not language or language in numbers:
            raise ConfigError(f"{flag} {text!r}: name each language once, such as {example}")
        numbers[language] = number
    return numbers


def parse_limits(text: str) -> dict[str, float]:
    """Return the limit of each language. Raises as `parse_numbers`."""
    return parse_numbers(text, flag="--limit", example="he=0.05,zh=0.1")


def parse_duration(text: str) -> str:
    """Return a duration as it was written, once it can be read. Raises as `read_duration`."""
    read_duration(text)
    return text


def read_duration(text: str) -> float:
    """Return the seconds of a duration such as `90s`, `10min` or `1.5h`.

    Raises:
        ConfigError: not a duration above 0.

    >>> read_duration("10min")
    600.0
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = 0.0 if match is None else float(match[1]) * _SECONDS[match[2]]
    if not seconds:
        raise ConfigError(f"time {text!r} is no duration above 0; write a number with its unit: 90s, 10min or 1h")
    return seconds


def parse_target(text: str) -> str:
    """Return a target as it was written, once it can be read. Raises as `read_target`."""
    read_target(text)
    return text


def read_target(text: str) -> tuple[str | None, float]:
    """Return the objective of a target, None where it names none, and the largest value to accept.

    Raises:
        ConfigError: neither NUMBER nor OBJECTIVE=NUMBER, or an objective that does not add up over units.

    >>> read_target("worst=0.1")
    ('worst', 0.1)
    """
    name, equals, value = (part.strip() for part in text.rpartition("="))
    try:
        number = float(value)
    except ValueError as err:
        raise ConfigError(f"--target {text!r}: write a KL in bits per byte, such as 0.1 or worst=0.1") from err
    if equals and name not in additive_objectives():
        raise ConfigError(f"--target {text!r}: a target is one of {one_of(additive_objectives())}; write worst=0.1")
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"--target {text!r}: give the largest KL to accept, in bits per byte, above 0")
    return name or None, number


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
