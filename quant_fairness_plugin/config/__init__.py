"""The one configuration class: what a user can choose, its defaults, its help, and what is refused before loading.

The command line takes options, help and defaults from the fields here; there is no second copy.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from pydantic import ConfigDict, TypeAdapter, ValidationError

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    CheckpointFormat,
    Clip,
    Grid,
    Precision,
    Reader,
    Start,
    TextSet,
    Unit,
    Weighting,
)
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.config.checks import (
    bits_of_rest,
    check_always_16_bit,
    check_calibration,
    check_calibration_texts,
    check_columns,
    check_limits,
    check_overrides,
    check_precisions,
    check_rest,
    check_tokens_per_expert,
)
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import (
    parse_bits,
    parse_group_size,
    parse_int8_layers,
    parse_languages,
    parse_limits,
    parse_max_size,
    parse_names,
    parse_precisions,
    parse_protection,
    parse_reference,
    parse_share,
    parse_target,
    read_target,
)
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import OBJECTIVES, find_objective
from quant_fairness_plugin.model.devices import Dtype, check_device_name
from quant_fairness_plugin.quantize.grid_rules import AUTO_GROUP_SIZES, check_bits, check_group_size
from quant_fairness_plugin.quantize.methods import METHODS, find_method
from quant_fairness_plugin.quantize.selection import Modules, fitting_group_size, group_sizes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FairConfig:
    """Everything that the whole line (measure, sweep, recommend, quantize, export, verify) is configured by."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    method: Annotated[str, Option("How weights are rounded:", "How to quantize", metavar="NAME", names=METHODS)] = (
        "gptq"
    )
    bits: Annotated[
        int, Option("Bits of a quantized weight.", "How to quantize", parse=parse_bits, metavar="INTEGER")
    ] = 4
    quantize_rest_to: str | None = None
    """The research scripts' word for `bits`: `INT4` or `INT8`. None where `bits` alone says it."""
    group_size: Annotated[
        int | Literal["auto"],
        Option(
            "Input channels that share a scale, at most: each unit takes the largest of 128, 64, 32 up to it that "
            "divides its input channels ('auto': up to 128); -1: all of a row.",
            "How to quantize",
            parse=parse_group_size,
            metavar="auto|32|64|128|-1",
            names=("auto", "32", "64", "128", "-1"),
        ),
    ] = "auto"
    symmetric: Annotated[
        bool | None,
        Option(
            "A symmetric grid, or one with zero points. Default: --asym for awq, else --sym.",
            "How to quantize",
            flag="--sym/--asym",
        ),
    ] = None
    """None = the method's default: AWQ with zero points, the others without (vLLM reads `gptq` files only so)."""
    clip: Annotated[
        Clip | None,
        Option(
            "How the range of a scale is set. Default: mse; for awq, which searches ranges itself, and other backends "
            "absmax. One of:",
            "How to quantize",
        ),
    ] = None
    """None = the method's default; other tools set ranges by rules of their own."""
    protect_layers: Annotated[
        Literal["auto", "none"] | tuple[int, ...],
        Option(
            "Layers that stay in 16 bit: indices from 0, such as 0,9,11; 'auto' chooses a precision for every unit; or "
            "'none'.",
            "What to protect",
            parse=parse_protection,
            metavar="LAYERS",
            names=("auto", "none"),
        ),
    ] = "auto"
    """`auto`: what scores (or a sweep) support within the limits; `none`; or layer indices counted from 0."""
    precisions: Annotated[
        tuple[Precision, ...] | None,
        Option(
            "What 'auto' may give a unit instead of --bits. Default: fp16,int8, as far as format and reader allow; "
            "fp16 alone sweeps whole layers.",
            "What to protect",
            parse=parse_precisions,
            metavar="LIST",
            names=("fp16", "fp16,int8"),
        ),
    ] = None
    """None: the menu, cut to what format and reader allow, by scores of units. `fp16` alone, a `top`, and objectives
    that do not add up over units take the research scripts' way: whole layers are swept and ranked."""
    exhaustive: Annotated[
        bool,
        Option(
            "'auto' evaluates every unit at every precision instead of scoring them by gradients; takes hours.",
            "What to protect",
            flag="--exhaustive/--no-exhaustive",
        ),
    ] = False
    protect_units: Annotated[
        tuple[str, ...],
        Option(
            "Parts of layers that stay in 16 bit too, as LAYER.UNIT: 3.down,5.qkv.",
            "What to protect",
            parse=parse_names,
            metavar="UNITS",
        ),
    ] = ()
    int8_layers: Annotated[
        tuple[int, ...],
        Option(
            "Layers that get 8 bits instead of --bits, such as 3,5.",
            "What to protect",
            parse=parse_int8_layers,
            metavar="LAYERS",
        ),
    ] = ()
    protect_columns: Annotated[
        float,
        Option(
            "Input channels of each quantized module in 16 bit, such as 1%; only our loader reads them.",
            "What to protect",
            parse=parse_share,
            metavar="SHARE",
        ),
    ] = 0.0
    """Share of the input channels of each quantized module that keeps 16 bit beside its integers, in a side file that
    only our own loader reads; those that matter most on the calibration text."""
    protect_biases: Annotated[
        bool,
        Option(
            "Biases stay in 16 bit: always the case, so this changes nothing.",
            "More",
            flag="--protect-biases/--no-protect-biases",
        ),
    ] = True
    protect_final_ln: Annotated[
        bool,
        Option(
            "The final norm stays in 16 bit: always the case, so this changes nothing.",
            "More",
            flag="--protect-final-ln/--no-protect-final-ln",
        ),
    ] = True
    top: Annotated[
        int | None, Option("'auto' protects exactly this many layers, whatever they cost.", "What to protect")
    ] = None
    max_overhead: Annotated[
        float,
        Option(
            "Budget of 'auto': extra bytes on disk over the all-quantized checkpoint; 0.2 = 20 %.", "What to protect"
        ),
    ] = 0.2
    max_size: Annotated[
        int | None,
        Option(
            "Budget of 'auto' instead: the tensors of the whole checkpoint, such as 120MB.",
            "What to protect",
            parse=parse_max_size,
            metavar="SIZE",
        ),
    ] = None
    target_bits: Annotated[
        float | None,
        Option(
            "Budget of 'auto' instead: mean bits of a weight in the layers, scales included, such as 4.5.",
            "What to protect",
        ),
    ] = None
    target: Annotated[
        str | None,
        Option(
            "The fewest bytes instead: largest damage to accept, KL in bits per byte, such as worst=0.1.",
            "What to protect",
            parse=parse_target,
            metavar="NAME=NUMBER",
        ),
    ] = None
    limits: Annotated[
        dict[str, float] | None,
        Option(
            "Largest KL (bits per byte) of single languages beside that, such as he=0.05,zh=0.1.",
            "What to protect",
            flag="--limit",
            parse=parse_limits,
            metavar="LIST",
        ),
    ] = None
    objective: Annotated[
        str,
        Option("Damage that protection lowers, over languages:", "What to protect", metavar="NAME", names=OBJECTIVES),
    ] = "worst"
    languages: Annotated[
        tuple[str, ...] | None,
        Option(
            "Languages to measure, such as en,he,ar,zh. Default: all of the text set.",
            "Texts",
            flag="--langs",
            parse=parse_languages,
            metavar="LIST",
        ),
    ] = None
    reference: Annotated[
        str | None,
        Option(
            "Language that excess and disparity are measured against, or 'none'.",
            "Texts",
            parse=parse_reference,
            metavar="LANGUAGE",
        ),
    ] = "en"
    texts: Annotated[
        str,
        Option("'bundled', a JSON, JSONL or TSV file, a folder, or datasets:NAME.", "Texts", metavar="SOURCE"),
    ] = "bundled"
    calibration_texts: Annotated[
        str | None,
        Option(
            "Text to calibrate on instead of the texts' own part: JSONL rows, CSV, TSV, JSON or a folder, not "
            "necessarily parallel, chats too.",
            "Texts",
            metavar="SOURCE",
        ),
    ] = None
    start: Annotated[
        Start,
        Option(
            "What stands before every text that is measured: auto is what the tokenizer puts there, else what parts "
            "documents. Calibration takes all in turn.",
            "Texts",
        ),
    ] = "auto"
    tokens_per_language: Annotated[
        int | None,
        Option("Calibration tokens of each language. Default: what the language with the fewest has.", "Texts"),
    ] = None
    tokens_per_expert: Annotated[
        int | None,
        Option(
            "Add calibration rows, of whichever language reaches them, until every expert of a mixture has so many "
            "tokens, as far as the text goes.",
            "Texts",
        ),
    ] = None
    calibration: Annotated[Weighting, Option("How much each language counts in calibration:", "Texts")] = "uniform"
    backend: Annotated[
        str,
        Option(
            "Who quantizes: native, gptqmodel, llmcompressor, or another installed one.",
            "How to quantize",
            metavar="NAME",
            names=("native", "gptqmodel", "llmcompressor"),
        ),
    ] = "native"
    """Our core (`native`), or a name of the entry points `quant_fairness.backends`."""
    format: Annotated[CheckpointFormat, Option("Checkpoint format:", "Output")] = "compressed-tensors"
    reader: Annotated[Reader, Option("Reader that must be able to load the checkpoint:", "Output")] = "transformers"
    device: Annotated[
        str,
        Option(
            "Where to compute: cpu, cuda, cuda:1, mps, xpu, or auto: the first accelerator that is there, else cpu.",
            "More",
            metavar="NAME",
            names=("auto", "cpu", "cuda", "mps", "xpu"),
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Option(
            "What to compute in; auto is bfloat16 for weights stored in it, on an accelerator and where this CPU "
            "multiplies faster in it, else float32:",
            "More",
        ),
    ] = "auto"
    gate: Annotated[
        str | None,
        Option(
            "Exit with status 6 unless the KL stays below a bound in every language, such as worst=0.05, or mean=0.05.",
            "Output",
            metavar="NAME=BOUND",
        ),
    ] = None
    draws: Annotated[int, Option("Bootstrap resamples behind every interval.", "More")] = 2000
    seed: Annotated[int, Option("Seed of every random draw.", "More")] = 0
    strict: Annotated[
        bool,
        Option(
            "An unstable ranking or a failed gate is an error (exit status 6), and so is a --group-size that does not "
            "fit every unit (exit status 2), not a warning.",
            "More",
            flag="--strict/--no-strict",
        ),
    ] = False

    def __post_init__(self) -> None:
        find_method(self.method)
        find_objective(self.objective)
        check_device_name(self.device)
        check_bits(self.bits)
        check_rest(self.quantize_rest_to, bits=self.bits)
        if self.group_size != "auto":
            check_group_size(self.group_size)
        if not 0 <= self.max_overhead <= 4:
            raise ConfigError(
                f"max_overhead {self.max_overhead} is no share of the all-quantized size; use 0.2 for 20 % extra bytes"
            )
        check_overrides(self.protect_layers, self.protect_units, self.int8_layers)
        check_precisions(self.precisions, bits=self.bits, top=self.top)
        check_limits(self.max_size, self.target_bits, self.target, self.limits, top=self.top)
        check_columns(self.protect_columns, method=self.method, backend=self.backend)
        check_always_16_bit(protect_biases=self.protect_biases, protect_final_ln=self.protect_final_ln)
        if self.gate is not None:
            Gate.parse(self.gate)
        if self.draws < 100:
            raise ConfigError(f"draws {self.draws} are too few for a 95 % interval; use 2000 or more, at least 100")
        check_calibration(self.calibration, method=self.method, tokens_per_language=self.tokens_per_language)
        check_calibration_texts(self.calibration_texts, method=self.method)
        check_tokens_per_expert(self.tokens_per_expert, method=self.method)

    @property
    def grid(self) -> Grid:
        """Return the integer grid of the quantized layers.

        Its group size is the largest that `auto` can come to, until `fitted` knows the model.
        """
        symmetric = find_method(self.method).symmetric if self.symmetric is None else self.symmetric
        group_size = AUTO_GROUP_SIZES[0] if self.group_size == "auto" else self.group_size
        clip = self.clip or (find_method(self.method).clip if self.backend == "native" else "absmax")
        return Grid(bits=self.bits, group_size=group_size, symmetric=symmetric, clip=clip)

    def fitted(self, model: Modules, *, uniform: bool = False) -> FairConfig:
        """Return the same configuration with the largest group size that the units of a model take.

        Where none fits any of them, `auto` is one scale for a whole row.

        Args:
            model: the model, or its outline.
            uniform: all units take one size, because the format or its reader knows one.
        """
        if self.group_size == -1:
            return self
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
    def decides_by(self) -> str:
        """Return the objective of the plan: that of `target`, else `objective`."""
        return self.objective if self.target is None else read_target(self.target)[0] or self.objective

    @property
    def scores_units(self) -> bool:
        """Return whether `auto` scores units by gradients; else it sweeps."""
        swept = self.exhaustive or self.top is not None or self.precisions == ("fp16",)
        return self.protect_layers == "auto" and not swept and find_objective(self.decides_by).adds_up

    @property
    def menu(self) -> tuple[Precision, ...]:
        """Return what `auto` may give instead of the grid's precision, before format and reader are asked."""
        if self.precisions is not None:
            return self.precisions
        return ("fp16", "int8") if self.bits < 8 and (self.exhaustive or self.scores_units) else ("fp16",)

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
        values = {name: getattr(self, name) for name in self.__slots__}
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
            return TypeAdapter(cls).validate_json(json.dumps(values, default=str), strict=True)
        except ValidationError as err:
            raise ConfigError(_explain(err)) from err


class FairOptions(TypedDict, total=False):
    """The fields of `FairConfig` as keyword arguments, for type checkers; `texts` can also be the set itself.

    A test compares the two.
    """

    method: str
    bits: int
    quantize_rest_to: str | None
    group_size: int | Literal["auto"]
    symmetric: bool | None
    clip: Clip | None
    protect_layers: Literal["auto", "none"] | tuple[int, ...] | list[int]
    precisions: tuple[Precision, ...] | list[Precision] | None
    exhaustive: bool
    protect_units: tuple[str, ...] | list[str]
    int8_layers: tuple[int, ...] | list[int]
    protect_columns: float
    protect_biases: bool
    protect_final_ln: bool
    top: int | None
    max_overhead: float
    max_size: int | None
    target_bits: float | None
    target: str | None
    limits: dict[str, float] | None
    objective: str
    languages: tuple[str, ...] | list[str] | None
    reference: str | None
    texts: str | Path | TextSet
    calibration_texts: str | None
    start: Start
    tokens_per_language: int | None
    tokens_per_expert: int | None
    calibration: Weighting
    backend: str
    format: CheckpointFormat
    reader: Reader
    device: str
    dtype: Dtype
    gate: str | None
    draws: int
    seed: int
    strict: bool


def make_config(**values: Any) -> FairConfig:
    """Return a `FairConfig` from loosely typed values (keyword arguments, a parsed command line).

    Raises:
        ConfigError: an unknown name or a value of the wrong type; names the field and what is accepted.
    """
    try:
        return TypeAdapter(FairConfig).validate_python(_complete(values), strict=False)
    except ValidationError as err:
        raise ConfigError(_explain(err)) from err


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with `bits` where only `quantize_rest_to` says it.

    Integers are checked here, before pydantic turns True into 1 and "4" into 4.
    """
    rest = values.get("quantize_rest_to")
    derived = {"bits": bits_of_rest(rest)} if isinstance(rest, str) and "bits" not in values else {}
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
        hint = f"; known names: {', '.join(FairConfig.__slots__)}"
    elif where == "protect_layers":
        hint = ", or a list of layer indices such as [0, 9, 11]"
    return f"{where} {first['input']!r}: {first['msg']}{hint}"
