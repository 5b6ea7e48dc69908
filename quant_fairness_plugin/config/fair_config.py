"""The one configuration class: what a user can choose, and what is refused before loading.

Its fields stand in a file for each box of `--help`.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from quant_fairness_plugin.artifacts import (
    FINE_GROUPS,
    FINEST_GROUP,
    Bootstrap,
    Grid,
    Precision,
    Unit,
    bits_of_precision,
)
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.config.checks import (
    bits_of_rest,
    check_always_16_bit,
    check_calibration,
    check_calibration_texts,
    check_columns,
    check_effort,
    check_gguf_file,
    check_limits,
    check_overrides,
    check_precisions,
    check_rest,
    check_search,
    check_tokens_per_expert,
    menu_of_format,
)
from quant_fairness_plugin.config.languages import LanguageFields
from quant_fairness_plugin.config.output import OutputFields
from quant_fairness_plugin.config.parsers import read_target
from quant_fairness_plugin.config.protection import ProtectionFields
from quant_fairness_plugin.config.quantizing import QuantizingFields
from quant_fairness_plugin.config.scheme_checks import check_scheme
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.model.devices import check_device_name
from quant_fairness_plugin.model.gguf import BLOCK, FORMAT
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.grid_rules import AUTO_GROUP_SIZES, check_bits, check_group_size
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.quantize.schemes import SCHEMES
from quant_fairness_plugin.quantize.selection import Modules, fitting_group_size, group_sizes, usual_group_size

_logger = logging.getLogger(__name__)


# Fields of the last base come first.
@dataclass(frozen=True, kw_only=True)
class FairConfig(OutputFields, LanguageFields, ProtectionFields, QuantizingFields):
    """Everything that the whole line (measure, sweep, recommend, quantize, export, verify) is configured by."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        find_method(self.method)
        find_objective(self.objective)
        check_device_name(self.device)
        check_bits(self.bits)
        check_rest(self.quantize_rest_to, bits=self.bits)
        check_scheme(self, format=self.format, columns=self.protect_columns, int8_layers=self.int8_layers)
        if self.group_size != "auto":
            check_group_size(self.group_size)
        if not 0 <= self.max_overhead <= 4:
            raise ConfigError(
                f"max_overhead {self.max_overhead} is no share of the all-quantized size; use 0.2 for 20 % extra bytes"
            )
        check_overrides(self.protect_layers, self.protect_units, self.int8_layers)
        check_precisions(self.precisions, bits=self.bits, top=self.top, format=self.format)
        check_limits(self.max_size, self.target_bits, self.target, self.limits, top=self.top)
        check_search(self.time, self.sentences, sweeps=self._sweeps)
        check_effort(self.effort, method=self.method, backend=self.backend)
        check_columns(self.protect_columns, method=self.method, backend=self.backend)
        check_always_16_bit(protect_biases=self.protect_biases, protect_final_ln=self.protect_final_ln)
        sweeps = self._sweeps if self.protect_layers == "auto" else ""
        check_gguf_file(self.format, self.like, self.embedding, columns=self.protect_columns, sweeps=sweeps)
        if self.gate is not None:
            Gate.parse(self.gate)
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is below 0; use a whole number from 0 on, such as 0")
        if self.draws < 100:
            raise ConfigError(f"draws {self.draws} are too few for a 95 % interval; use 2000 or more, at least 100")
        check_calibration(self.calibration, method=self.method, tokens_per_language=self.tokens_per_language)
        check_calibration_texts(self.calibration_texts, method=self.method)
        check_tokens_per_expert(self.tokens_per_expert, method=self.method)

    @property
    def grid(self) -> Grid:
        """Return the grid of the quantized layers.

        Its group size is the largest that `auto` can come to, until `fitted` knows the model.
        """
        clip = self.clip or (find_method(self.method).clip if self.backend == NATIVE else "absmax")
        if self.scheme in SCHEMES:
            return SCHEMES[self.scheme].grid(clip)
        symmetric = find_method(self.method).symmetric if self.symmetric is None else self.symmetric
        largest = BLOCK if self.format == FORMAT else AUTO_GROUP_SIZES[0]
        group_size = largest if self.group_size == "auto" else self.group_size
        return Grid(bits=self.bits, group_size=group_size, symmetric=symmetric, clip=clip)

    def fitted(self, model: Modules, *, uniform: bool = False) -> FairConfig:
        """Return the same configuration with the largest group size that a model's units take; no unit takes a larger.

        `auto` is the size that most of the weights take: larger groups of the others would save next to nothing, and
        lose more. Where none fits any unit, it is one scale for a whole row.

        Args:
            model: the model, or its outline.
            uniform: all units take one size, because the format or its reader knows one.
        """
        if self.group_size == -1 or self.scheme in SCHEMES:
            return self
        if self.group_size == "auto" and not uniform:
            largest = usual_group_size(model, self.grid.group_size)
        else:
            largest = fitting_group_size(model, self.grid.group_size, uniform=uniform)
        if largest is None:
            return replace(self, group_size=-1) if self.group_size == "auto" else self
        return replace(self, group_size=largest)

    def check_group_size(self, model: Modules) -> None:
        """Warn of units that a stated group size does not fit, and of the sizes that they take.

        Raises:
            ConfigError: there are some, and the configuration is strict.
        """
        if self.group_size in ("auto", -1):
            return
        sizes = group_sizes(model, self.grid)
        others = {unit: size for unit, size in sizes.items() if size != self.group_size}
        if not others:
            return
        message = (
            f"group size {self.group_size} does not divide the input channels of {len(others)} of {len(sizes)} units, "
            f"first {next(iter(others))}"
        )
        names = " or ".join(map(str, sorted(set(others.values()), reverse=True)))
        if self.strict:
            raise ConfigError(f"{message}; they would take {names}. Use --group-size auto, or leave --strict out")
        _logger.warning("%s: they take %s", message, names)

    @property
    def eight_bit_tables(self) -> bool:
        """Return whether the embedding and the head are written in 8 bits."""
        return self.format == FORMAT and self.embedding == "q8_0"

    def gguf_template(self, given: str | Path | None = None) -> Path:
        """Return the GGUF file of the 16-bit model whose metadata an output of format `gguf` gets.

        Args:
            given: the file; None is `like`.

        Raises:
            ConfigError: another format, or no such file.
        """
        if self.format != FORMAT:
            raise ConfigError(f"format {self.format!r} is no GGUF file; use format={FORMAT!r} (--format {FORMAT})")
        path = self.like if given is None else given
        if path is None or not Path(path).is_file():
            found = "none is given" if path is None else f"{str(path)!r} is no file"
            raise ConfigError(
                f"like: format {FORMAT!r} takes metadata and tokenizer from a GGUF file of the 16-bit model, and "
                f"{found}; give one with --like, of any type: what convert_hf_to_gguf.py of llama.cpp writes, or one "
                "from the Hub"
            )
        return Path(path)

    @property
    def decides_by(self) -> str:
        """Return the objective of the plan: that of `target`, else `objective`."""
        return self.objective if self.target is None else read_target(self.target)[0] or self.objective

    @property
    def scores_units(self) -> bool:
        """Return whether `auto` scores units by gradients; else it sweeps."""
        return not self._sweeps

    @property
    def goes_in_blocks(self) -> bool:
        """Return whether a checkpoint is made block by block as fast as with the whole model in memory.

        Sweeps are faster with it, and other tools take it.
        """
        return self.backend == NATIVE and (self.protect_layers != "auto" or self.scores_units)

    @property
    def _sweeps(self) -> str:
        """Return why no scores are made; empty where they are."""
        if self.protect_layers != "auto":
            given = (
                self.protect_layers if isinstance(self.protect_layers, str) else ",".join(map(str, self.protect_layers))
            )
            return f"protect_layers {given} leaves no plan to find"
        if self.top is not None:
            return f"top {self.top} is the first of a sweep of layers"
        if self.exhaustive or self.precisions == ("fp16",):
            return f"{'exhaustive' if self.exhaustive else 'precisions fp16'} asks for a sweep"
        by = self.decides_by
        return "" if find_objective(by).adds_up else f"objective {by} asks for a sweep: it does not add up over units"

    @property
    def menu(self) -> tuple[Precision, ...]:
        """Return what `auto` may give instead of the grid's precision, before format and reader are asked."""
        if self.precisions is not None:
            return self.precisions
        if not (self.exhaustive or self.scores_units):
            return ("fp16",)
        return tuple(kind for kind in menu_of_format(self.format) if self._is_wider(kind))

    def _is_wider(self, kind: Precision) -> bool:
        """Return whether a precision takes more bytes than the grid's own."""
        if kind != FINE_GROUPS:
            return bits_of_precision(kind) > self.bits
        return self.scheme == "int" and self.group_size != FINEST_GROUP and self.bits <= bits_of_precision(kind)

    @property
    def bootstrap(self) -> Bootstrap:
        """Return how intervals and tests are made."""
        return Bootstrap(self.reference, self.draws, self.seed)

    @property
    def overrides(self) -> dict[str, Precision]:
        """Return what `protect_units` and `int8_layers` say, as in `ProtectionPlan.overrides`."""
        layers: dict[str, Precision] = {str(Unit(layer)): "int8" for layer in self.int8_layers}
        return layers | {str(Unit.parse(name)): "fp16" for name in self.protect_units}

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON and YAML write it: tuples become lists. `from_dict` reads it back."""
        values = {name: getattr(self, name) for name in _names()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> FairConfig:
        """Return the configuration of a decoded JSON or YAML document; fields that it lacks keep their defaults.

        Raises:
            ConfigError: an unknown field or a value of the wrong type ("4" is no number); says which.
        """
        values = _complete(document)
        try:
            # JSON mode is strict about types and reads a list as a tuple. What JSON lacks, such as a date, is text.
            return _adapter().validate_json(json.dumps(values, default=str), strict=True)
        except ValidationError as err:
            raise ConfigError(_explain(err)) from err


def make_config(**values: Any) -> FairConfig:
    """Return a `FairConfig` from loosely typed values (keyword arguments, a parsed command line).

    Raises:
        ConfigError: an unknown name or a value of the wrong type; names the field and what is accepted.
    """
    try:
        return _adapter().validate_python(_complete(values), strict=False)
    except ValidationError as err:
        raise ConfigError(_explain(err)) from err


@cache
def _adapter() -> TypeAdapter[FairConfig]:
    return TypeAdapter(FairConfig)


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with `bits` where only `quantize_rest_to` or `scheme` says it.

    Integers are checked here, before pydantic turns True into 1 and "4" into 4.
    """
    rest = values.get("quantize_rest_to")
    scheme = SCHEMES.get(str(values.get("scheme")))
    derived: dict[str, Any] = {}
    if "bits" not in values and (scheme is not None or isinstance(rest, str)):
        derived["bits"] = bits_of_rest(str(rest)) if scheme is None else scheme.bits
    if "bits" in values:
        check_bits(values["bits"])
    if values.get("group_size", "auto") != "auto":
        check_group_size(values["group_size"])
    return {**values, **derived}


def _explain(err: ValidationError) -> str:
    first = err.errors()[0]
    where = str(first["loc"][0]) if first["loc"] else "configuration"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    hint = ""
    if first["type"] == "unexpected_keyword_argument":
        hint = f"; known names: {', '.join(_names())}"
    elif where == "protect_layers":
        hint = ", or a list of layer indices such as [0, 9, 11]"
    return f"{where} {reprlib.repr(first['input'])}: {first['msg']}{hint}"


def _names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(FairConfig))
