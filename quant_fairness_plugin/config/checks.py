"""What a configuration refuses before a model is known."""

from __future__ import annotations

import math
import re
from typing import Literal

from quant_fairness_plugin.artifacts import (
    FINE_GROUPS,
    Effort,
    Precision,
    Unit,
    Weighting,
    precision_of_bits,
    precision_order,
)
from quant_fairness_plugin.config.parsers import read_duration, read_target
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.gguf import FORMAT, TYPES, Embedding
from quant_fairness_plugin.quantize.methods import find_method, method_names

MOST_COLUMNS = 0.5
"""At three quarters, 4 bits and the channels in 16 are as large as the module in 16."""
LEAST_TO_SEARCH = 2
"""Sentences of each language: of one, no interval can be had."""
_WIDTH = re.compile(r"int([2-8])", re.ASCII | re.IGNORECASE)


def bits_of_rest(quantize_rest_to: str) -> int:
    """Return the bits of the research scripts' `quantize_rest_to`: `INT4` or `int4` is 4.

    Raises:
        ConfigError: another word.
    """
    match = _WIDTH.fullmatch(quantize_rest_to)
    if match is None:
        raise ConfigError(f"quantize_rest_to {quantize_rest_to!r} is not an integer type; use 'INT4' or 'INT8'")
    return int(match[1])


def check_rest(quantize_rest_to: str | None, *, bits: int) -> None:
    """Refuse a width of the rest that is not the configuration's.

    Raises:
        ConfigError: not an integer type, or one of another width than `bits`.
    """
    if quantize_rest_to is not None and bits_of_rest(quantize_rest_to) != bits:
        raise ConfigError(
            f"quantize_rest_to {quantize_rest_to!r} and bits {bits} contradict each other; leave one of them out, or "
            f"use bits={bits_of_rest(quantize_rest_to)}"
        )


def check_always_16_bit(*, protect_biases: bool, protect_final_ln: bool) -> None:
    """Refuse to quantize what no checkpoint format stores quantized.

    Raises:
        ConfigError: biases or the final norm should be quantized.
    """
    for name, part, kept in (
        ("protect_biases", "biases", protect_biases),
        ("protect_final_ln", "the final norm", protect_final_ln),
    ):
        if not kept:
            raise ConfigError(
                f"{name} False (--no-{name.replace('_', '-')}) is not possible: every checkpoint format keeps {part} "
                "in 16 bit; leave it out, or see what it would do with sweep --also"
            )


def check_overrides(
    protect_layers: Literal["auto", "none"] | tuple[int, ...],
    protect_units: tuple[str, ...],
    int8_layers: tuple[int, ...],
) -> None:
    """Refuse precisions of single layers and units that contradict each other. The model is not known yet.

    Raises:
        ConfigError: not a unit, a negative or repeated index, or a layer or unit with two precisions.
    """
    for name in protect_units:
        if not _is_unit(name):
            raise ConfigError(
                f"protect_units {name!r} is not a unit; write LAYER.UNIT, such as 3.down or 5.qkv, with commas between"
            )
    places = [*map(str, int8_layers), *protect_units]
    for place in places:
        if place.startswith("-") or places.count(place) > 1:
            problem = "negative" if place.startswith("-") else "listed more than once"
            raise ConfigError(
                f"{place} is {problem}; layers are counted from 0, and each layer or unit may be named once. Correct "
                "the list"
            )
    whole = protect_layers if isinstance(protect_layers, tuple) else ()
    for place in places:
        if Unit.parse(place).layer in whole:
            raise ConfigError(
                f"{place} is in protect_layers {','.join(map(str, whole))} too, whose layers keep 16 bit as a whole; "
                f"leave {place} out of one of the two"
            )


def check_limits(
    max_size: int | None,
    target_bits: float | None,
    target: str | None,
    limits: dict[str, float] | None,
    *,
    top: int | None,
) -> None:
    """Refuse limits that exclude each other or that no plan keeps.

    Raises:
        ConfigError: several of `max_size`, `target_bits`, `target` and `top`, or one that is out of range.
    """
    given = {"max_size": max_size, "target_bits": target_bits, "target": target, "top": top}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} exclude each other; give one budget, a target, or a number of layers")
    if limits is not None and top is not None:
        raise ConfigError(f"limits of languages and top {top} exclude each other; leave one of them out")
    if max_size is not None and max_size < 1:
        raise ConfigError(f"max_size {max_size} is no size; give the bytes of the checkpoint, such as 120MB")
    if target_bits is not None and not 2 <= target_bits <= 16:
        raise ConfigError(f"target_bits {target_bits} is no width between 2 and 16; use a number such as 4.5")
    if target is not None:
        read_target(target)
    for language, value in (limits or {}).items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"limit {language}={value}: give the largest KL to accept, in bits per byte, above 0")


def check_search(time: str | None, sentences: int | None, *, sweeps: str) -> None:
    """Refuse bounds of a search for a plan that cannot be kept, or where there is no such search.

    Args:
        time: how long it may take.
        sentences: how many of each language it is made on.
        sweeps: why no plan is searched for by scores; empty where one is.

    Raises:
        ConfigError: names the value and what is accepted.
    """
    if time is not None:
        read_duration(time)
    if sentences is not None and sentences < LEAST_TO_SEARCH:
        raise ConfigError(
            f"sentences {sentences} are too few to compare plans on; use {LEAST_TO_SEARCH} or more of each language"
        )
    for name, value in (("time", time), ("sentences", sentences)):
        if value is not None and sweeps:
            raise ConfigError(
                f"{name} {value} bounds the search for a plan by scores, and {sweeps}; give protect_layers auto with a "
                f"budget or a target, or leave {name} out"
            )


def check_precisions(precisions: tuple[Precision, ...] | None, *, bits: int, top: int | None, format: str) -> None:
    """Refuse precisions that `auto` cannot choose from.

    Raises:
        ConfigError: without `fp16`, or beside it others than `int8`, and `int5` in a GGUF file; one that is not wider
            than the grid, or with a number of layers to protect.
    """
    if precisions is None:
        return
    given, wider = ",".join(precisions), menu_of_format(format)
    if "fp16" not in precisions or not set(precisions) <= set(wider) or len(set(precisions)) < len(precisions):
        raise ConfigError(
            f"precisions {given or '(none)'}: beside the quantized layers a checkpoint holds fp16, or fp16 with "
            f"{' and '.join(wider[1:])}; name those, with commas between"
        )
    narrow = [kind for kind in precisions if precision_order(kind) <= precision_order(precision_of_bits(bits))]
    if narrow or (len(precisions) > 1 and top is not None):
        problem = f"bits {bits} is no less" if narrow else f"top {top} is a number of layers in 16 bit"
        left = narrow[0] if narrow else next(kind for kind in precisions if kind != "fp16")
        raise ConfigError(f"precisions {given}: {problem}; leave {left} out, or give a budget with max_overhead")


def menu_of_format(format: str) -> tuple[Precision, ...]:
    """Return what a checkpoint of a format can hold beside most of its weights."""
    if format != FORMAT:
        # Of `gptq`, Transformers overlooks the rules that give a module another group size.
        return ("fp16", "int8", FINE_GROUPS) if format == "compressed-tensors" else ("fp16", "int8")
    return ("fp16", *map(precision_of_bits, sorted(TYPES, reverse=True)[:-1]))


def check_columns(share: float, *, method: str, backend: str) -> None:
    """Refuse a share of 16-bit input channels that cannot be selected, or that costs more than 16 bit for the module.

    Raises:
        ConfigError: outside 0..`MOST_COLUMNS`, or with a method or backend that does not know which channels matter.
    """
    if not 0 <= share <= MOST_COLUMNS:
        raise ConfigError(
            f"protect_columns {share} is no share of the input channels up to {MOST_COLUMNS:g}; use 0.01 for 1 %, or "
            "protect whole units with protect_units"
        )
    if share and (not find_method(method).keeps_columns or backend != "native"):
        raise ConfigError(
            f"protect_columns {share:g} cannot be used with method {method!r} and backend {backend!r}: which input "
            "channels matter only our calibration says; use method "
            f"{method_names(lambda m: m.keeps_columns)} with backend 'native'"
        )


def check_effort(effort: Effort, *, method: str, backend: str) -> None:
    """Refuse an effort that a method or another tool does not know.

    Raises:
        ConfigError: names the methods that do.
    """
    if effort != "normal" and (effort not in find_method(method).efforts or backend != "native"):
        raise ConfigError(
            f"effort {effort!r} has no effect on method {method!r} with backend {backend!r}; use method "
            f"{method_names(lambda m: effort in m.efforts)} with backend 'native', or leave effort out"
        )


def check_gguf_file(format: str, like: str | None, embedding: Embedding, *, columns: float, sweeps: str) -> None:
    """Refuse what only a GGUF file has for another format, and what it has no place for.

    Args:
        format: the format.
        like: the GGUF file to take metadata from.
        embedding: what embedding and head are stored as.
        columns: the share of 16-bit input channels.
        sweeps: why a plan comes from a sweep, whose bytes are those of a folder; empty where none does.

    Raises:
        ConfigError: names the field.
    """
    if format != FORMAT:
        given = "like" if like is not None else "embedding" if embedding != "q8_0" else ""
        if given:
            raise ConfigError(
                f"{given} has an effect on format {FORMAT!r} alone, and the format is {format!r}; leave it out"
            )
        return
    if columns:
        raise ConfigError(
            f"protect_columns {columns:g}: a GGUF file has no place for them; leave it out, or protect whole units"
        )
    if sweeps:
        raise ConfigError(f"{sweeps}, and plans for a GGUF file are made from scores; leave that out")


def check_calibration(calibration: Weighting, *, method: str, tokens_per_language: int | None) -> None:
    """Refuse a weighting of languages that has no effect, or that fixes the number of tokens itself.

    Raises:
        ConfigError: a weighting with a method that does not calibrate; `proportional` with a number of tokens.
    """
    if not find_method(method).needs_calibration and calibration != "uniform":
        raise ConfigError(
            f"calibration {calibration!r} has no effect on method {method!r}, which uses no calibration text; use "
            f"method {method_names(lambda m: m.needs_calibration)}, or leave calibration out"
        )
    if calibration == "proportional" and tokens_per_language is not None:
        raise ConfigError(
            f"calibration 'proportional' takes all tokens of every language, not {tokens_per_language} each; leave "
            "tokens_per_language out, or use calibration 'uniform'"
        )


def check_calibration_texts(source: str | None, *, method: str) -> None:
    """Refuse text to calibrate on with a method that does not calibrate.

    Raises:
        ConfigError: there is some.
    """
    if source is not None and not find_method(method).needs_calibration:
        raise ConfigError(
            f"calibration_texts {source!r} has no effect on method {method!r}, which uses no calibration text; use "
            f"method {method_names(lambda m: m.needs_calibration)}, or leave it out"
        )


def check_tokens_per_expert(tokens: int | None, *, method: str) -> None:
    """Refuse a number of tokens that no expert can be given.

    Raises:
        ConfigError: below 1, or with a method that does not calibrate.
    """
    if tokens is None:
        return
    if tokens < 1 or not find_method(method).needs_calibration:
        raise ConfigError(
            f"tokens_per_expert {tokens} cannot be used with method {method!r}; use 1 or more, with method "
            f"{method_names(lambda m: m.needs_calibration)}, or leave it out"
        )


def _is_unit(name: str) -> bool:
    try:
        unit = Unit.parse(name)
    except ConfigError:
        return False
    return unit.group is not None and unit.short == name
