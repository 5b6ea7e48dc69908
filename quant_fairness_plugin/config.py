"""The one configuration class: what a user can choose, its defaults, and what is refused before anything is loaded.

The command line takes its help and defaults from here; there is no second copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

from pydantic import ConfigDict, TypeAdapter, ValidationError

from quant_fairness_plugin.artifacts import (
    CheckpointFormat,
    Clip,
    Grid,
    Objective,
    Precision,
    Reader,
    Weighting,
)
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.grid_rules import check_bits, check_group_size
from quant_fairness_plugin.quantize.methods import find_method, method_names

MOST_COLUMNS = 0.5
"""At three quarters, 4 bits and the channels in 16 are as large as the module in 16."""
_UNIT = re.compile(r"[0-9]{1,9}\.[A-Za-z_][\w.]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class FairConfig:
    """Everything that the whole line (measure, sweep, recommend, quantize, export, verify) can be told."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    method: str = "gptq"
    """A name of `quantize.methods.METHODS`."""
    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None
    """None = the method's own: AWQ with zero points, the others without (vLLM reads `gptq` files only so)."""
    clip: Clip = "absmax"
    protect_layers: Literal["auto", "none"] | tuple[int, ...] = "auto"
    """`auto`: as many layers as the sweep supports within `max_overhead`; `none`; or layer indices counted from 0."""
    precisions: tuple[Precision, ...] = ("fp16",)
    """What `auto` may give a layer instead of `bits`: `fp16`, and `int8`, which costs half as much."""
    protect_units: tuple[str, ...] = ()
    """Fusion groups that stay in 16 bit besides, such as `3.down`."""
    int8_layers: tuple[int, ...] = ()
    """Layers that get 8 bits instead of `bits`."""
    protect_columns: float = 0.0
    """Share of the input channels of each quantized module that keeps 16 bit beside its integers, in a side file that
    only our own loader reads; those that matter most on the calibration text."""
    top: int | None = None
    """Protect exactly this many layers by the sweep's ranking, instead of `auto`'s budget."""
    max_overhead: float = 0.2
    """`auto`'s budget: extra bytes on disk over the all-quantized checkpoint."""
    objective: Objective = "worst"
    languages: tuple[str, ...] | None = None
    reference: str | None = "en"
    texts: str = "bundled"
    tokens_per_language: int | None = None
    """Calibration tokens of each language; None = what the language with the fewest has."""
    calibration: Weighting = "uniform"
    """How much each language counts in calibration."""
    backend: str = "native"
    """Who quantizes: our own core, `gptqmodel`, `llmcompressor`, or a name of the entry points
    `quant_fairness.backends`."""
    format: CheckpointFormat = "compressed-tensors"
    reader: Reader = "transformers"
    """The reader that must be able to load the checkpoint."""
    draws: int = 2000
    seed: int = 0
    strict: bool = False
    """An unstable ranking or a failed gate is an error (exit status 6) instead of a warning."""

    def __post_init__(self) -> None:
        method = find_method(self.method)
        check_bits(self.bits)
        check_group_size(self.group_size)
        if not 0 <= self.max_overhead <= 4:
            raise ConfigError(
                f"max_overhead {self.max_overhead} is no share of the all-quantized size; use 0.2 for 20 % extra bytes"
            )
        check_overrides(self.protect_layers, self.protect_units, self.int8_layers)
        check_precisions(self.precisions, bits=self.bits, top=self.top)
        check_columns(self.protect_columns, method=self.method, backend=self.backend)
        if self.draws < 100:
            raise ConfigError(f"draws {self.draws} are too few for a 95 % interval; use 2000 or more, at least 100")
        if not method.needs_calibration and self.calibration != "uniform":
            raise ConfigError(
                f"calibration {self.calibration!r} has no effect on method {self.method!r}, which uses no calibration "
                f"text; use method {method_names(lambda m: m.needs_calibration)}, or leave calibration out"
            )
        if self.calibration == "proportional" and self.tokens_per_language is not None:
            raise ConfigError(
                f"calibration 'proportional' takes all tokens of every language, not {self.tokens_per_language} each; "
                "leave tokens_per_language out, or use calibration 'uniform'"
            )

    @property
    def grid(self) -> Grid:
        """The integer grid of the quantized layers."""
        symmetric = find_method(self.method).symmetric if self.symmetric is None else self.symmetric
        return Grid(bits=self.bits, group_size=self.group_size, symmetric=symmetric, clip=self.clip)

    @property
    def overrides(self) -> dict[str, Precision]:
        """What `protect_units` and `int8_layers` say, as in `ProtectionPlan.overrides`."""
        layers: dict[str, Precision] = {f"layers.{layer}": "int8" for layer in self.int8_layers}
        return layers | {f"layers.{unit}": "fp16" for unit in self.protect_units}


class FairOptions(TypedDict, total=False):
    """The fields of `FairConfig` as keyword arguments, each optional; `texts`, which can be a set, comes apart."""

    method: str
    bits: int
    group_size: int
    symmetric: bool | None
    clip: Clip
    protect_layers: Literal["auto", "none"] | tuple[int, ...] | list[int]
    precisions: tuple[Precision, ...] | list[Precision]
    protect_units: tuple[str, ...] | list[str]
    int8_layers: tuple[int, ...] | list[int]
    protect_columns: float
    top: int | None
    max_overhead: float
    objective: Objective
    languages: tuple[str, ...] | list[str] | None
    reference: str | None
    tokens_per_language: int | None
    calibration: Weighting
    backend: str
    format: CheckpointFormat
    reader: Reader
    draws: int
    seed: int
    strict: bool


def check_overrides(
    protect_layers: Literal["auto", "none"] | tuple[int, ...],
    protect_units: tuple[str, ...],
    int8_layers: tuple[int, ...],
) -> None:
    """Refuse precisions of single layers and units that contradict each other. The model is not known yet.

    Raises:
        ConfigError: no unit, a negative or repeated index, or a layer or unit that is given two precisions.
    """
    for unit in protect_units:
        if not _UNIT.fullmatch(unit):
            raise ConfigError(
                f"protect_units {unit!r} is no unit; write LAYER.UNIT, such as 3.down or 5.qkv, with commas between"
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
        if int(place.partition(".")[0]) in whole:
            raise ConfigError(
                f"{place} is in protect_layers {','.join(map(str, whole))} too, whose layers keep 16 bit as a whole; "
                f"leave {place} out of one of the two"
            )


def check_precisions(precisions: tuple[Precision, ...], *, bits: int, top: int | None) -> None:
    """Refuse precisions that `auto` cannot choose from.

    Raises:
        ConfigError: not `fp16`, or `fp16` and `int8`; `int8` on an 8-bit grid, or with a number of layers to protect.
    """
    given = ",".join(precisions)
    if sorted(precisions) not in (["fp16"], ["fp16", "int8"]):
        raise ConfigError(f"precisions {given or '(none)'}: a checkpoint has fp16, or fp16,int8, besides; use those")
    if "int8" in precisions and (bits == 8 or top is not None):
        problem = "bits 8 is the same" if bits == 8 else f"top {top} is a number of layers in 16 bit"
        raise ConfigError(f"precisions {given}: {problem}; leave int8 out, or give a budget with max_overhead")


def check_columns(share: float, *, method: str, backend: str) -> None:
    """Refuse a share of 16-bit input channels that cannot be chosen, or that costs more than 16 bit for the module.

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
            "channels matter only our own calibration tells; use method "
            f"{method_names(lambda m: m.keeps_columns)} with backend 'native'"
        )


def make_config(**chosen: Any) -> FairConfig:
    """A `FairConfig` from loosely typed values (keyword arguments, a parsed command line).

    Raises:
        ConfigError: an unknown name or a value of the wrong type; names the field and what is allowed.
    """
    # Before pydantic, which would turn True into 1 and "4" into 4.
    if "bits" in chosen:
        check_bits(chosen["bits"])
    if "group_size" in chosen:
        check_group_size(chosen["group_size"])
    try:
        return TypeAdapter(FairConfig).validate_python(chosen, strict=False)
    except ValidationError as err:
        raise ConfigError(_explain(err)) from err


def _explain(err: ValidationError) -> str:
    first = err.errors()[0]
    where = str(first["loc"][0]) if first["loc"] else "configuration"
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    allowed = (
        f"; known names: {', '.join(FairConfig.__slots__)}" if first["type"] == "unexpected_keyword_argument" else ""
    )
    return f"{where} {first['input']!r}: {first['msg']}{allowed}"
