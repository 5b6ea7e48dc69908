"""The dataclasses that cross stages. Plain data, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.experts import ExpertCoverage
from quant_fairness_plugin.errors import ConfigError

NO_SURPRISES = ConfigDict(extra="forbid")
"""A document with a field that this version does not know was written by another one."""
RECORD_NAME = "quant_fairness.json"
"""The file of a checkpoint folder that holds its `ExportRecord`."""

Precision = Literal["fp16", "int8", "int6", "int5", "int4", "int3", "int2"]
Part = Literal["calibrate", "search", "confirm", "all"]
Status = Literal["supported", "unsupported", "collapsed"]
Fluency = Literal["fluent", "weak", "none"]
"""How well the 16-bit model speaks a language: better than a byte n-gram, better than byte counts, or not even that."""
Mode = Literal["protect-one", "quantize-one"]
"""What a sweep singles units out for: to keep them in 16 bit, or to quantize nothing but them."""
Granularity = Literal["layer", "unit"]
"""What a sweep singles out: whole layers, or the fusion groups in them."""
SearchMethod = Literal["greedy", "backward", "beam"]
"""How sets of units are looked for: one more at a time, one fewer from all, or as `greedy` with the best few kept."""
Clip = Literal["absmax", "mse", "gaussian", "laplace", "student-t", "empirical", "minimax"]
Weighting = Literal["uniform", "proportional", "english", "minimax"]
"""How much each language counts in calibration."""
Start = Literal["auto", "encoded", "bos", "eos", "chat", "plain"]
"""What stands before a text that a model reads: see `model.beginnings`."""
Reader = str
"""A name in `checkpoint.readers.READERS`, which checks it."""
CheckpointFormat = str
"""A name in `checkpoint.formats.FORMATS`, which checks it: a new format touches no type."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Undefined:
    """The place of a number that could not be measured. Never a silent default."""

    undefined: str
    """The reason, as one sentence."""


Number = Interval | Undefined


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals and tests are made: the same resamples of the sentences for every plan and language."""

    reference: str | None = "en"
    """Language of excess and disparity; None where there is none."""
    draws: int = 2000
    """Resamples of the sentences."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """An integer grid: which values a quantized weight can take.

    `group_size` input channels share a scale: 32, 64, 128, or -1 for one scale per output channel. Of a whole model it
    is the largest: a fusion group whose input channels it does not divide takes the largest of 64 and 32 that does.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    clip: Clip = "absmax"

    def __str__(self) -> str:
        return f"int{self.bits} {self.groups} {'sym' if self.symmetric else 'asym'} {self.clip}"

    @property
    def groups(self) -> str:
        """The group size as people read it: `g128`, or `channel`."""
        return "channel" if self.group_size == -1 else f"g{self.group_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a number came from: enough to make it again."""

    versions: dict[str, str]
    model: str
    model_sha256: str
    text_set: str
    text_sha256: str
    arguments: dict[str, Any]
    """The arguments as resolved, defaults included."""
    seed: int
    device: str = ""
    """Where the model was computed; empty in results that do not say."""
    dtype: str = ""
    """What it was computed in, `float32` or `bfloat16`; empty in results that do not say."""
    source: str = ""
    """What the 16-bit model was computed from, where its files do not hold it: FP8 or MXFP4 weights."""
    start: str = ""
    """What stood before every text that was measured, a `Start` other than `auto`; empty in results that do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """The same sentences in every language (if `parallel`), in one order.

    `sentences[language][i]` belongs to `ids[i]`, `parts[i]` and `registers[i]`.
    """

    name: str
    sentences: dict[str, tuple[str, ...]]
    ids: tuple[str, ...]
    parts: tuple[Part, ...]
    registers: tuple[str, ...]
    parallel: bool
    sha256: str
    start: Start = "auto"
    """How the model meets each sentence; not in the checksum, as it is no part of the text."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Language tags, in the order of the set."""
        return tuple(self.sentences)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shared(self) -> int:
        """How many sentences belong to several parts: all of a set that was not split, and those that repeat."""
        owners: dict[tuple[str, str], set[Part]] = {}
        for language, rows in self.sentences.items():
            for text, part in zip(rows, self.parts, strict=True):
                owners.setdefault((language, text), set()).add(part)
        repeated = {key for key, parts in owners.items() if len(parts) > 1}
        return sum(
            part == "all" or any((language, rows[i]) in repeated for language, rows in self.sentences.items())
            for i, part in enumerate(self.parts)
        )

    def part(self, part: Part) -> TextSet:
        """The sentences of one part; a set that was too small to be split has one part, `all`, which serves as each."""
        return self.take([i for i, p in enumerate(self.parts) if p in (part, "all") or part == "all"])

    def take(self, keep: Sequence[int]) -> TextSet:
        """Some of the sentences, by position; the checksum stays that of the set they came from."""
        return replace(
            self,
            sentences={lang: tuple(rows[i] for i in keep) for lang, rows in self.sentences.items()},
            ids=tuple(self.ids[i] for i in keep),
            parts=tuple(self.parts[i] for i in keep),
            registers=tuple(self.registers[i] for i in keep),
        )

    def choose(self, languages: Sequence[str]) -> TextSet:
        """The same sentences in some of the languages; the checksum stays that of the set they came from."""
        return replace(self, sentences={language: self.sentences[language] for language in languages})


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageScores:
    """Per-sentence scores of one language under one model state; all tuples have one entry per sentence."""

    nll_nats: tuple[float, ...]
    """Negative log-likelihood summed over the scored tokens of the sentence."""
    tokens: tuple[int, ...]
    """Scored tokens (the first one counts where something stands in front of it)."""
    bytes_: tuple[int, ...]
    """UTF-8 bytes of the scored tokens."""
    kl_nats: tuple[float, ...]
    """KL(p16 ‖ p) over the full vocabulary, summed over the scored tokens; 0 for the 16-bit state itself."""
    flips: tuple[int, ...]
    """Scored tokens whose most likely next token differs from the 16-bit model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateScores:
    """One model state (16 bit, a plan, an exported checkpoint) on one part of a text set."""

    state: str
    languages: dict[str, LanguageScores]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageDamage:
    """What quantization did to one language. Degradations are quantized minus 16 bit: positive is worse."""

    language: str
    status: Status
    reason: str
    """Why the status is not `supported`, or the 16-bit model speaks the language weakly; empty where it is fluent."""
    sentences: int
    tokens: int
    bytes_: int
    baseline_bpb: float
    quantized_bpb: float
    delta_bpb: Interval
    kl_bits_per_byte: Interval
    delta_nats_per_sentence: Interval
    flip_rate: Interval
    excess_bpb: Number
    """ΔBPB minus the reference language's ΔBPB."""
    disparity: Number
    """ΔBPB over the reference language's ΔBPB, or undefined where the denominator's interval touches 0."""
    adjusted_p: float
    """Two-sided bootstrap p-value of ΔBPB = 0, Benjamini-Hochberg adjusted over the languages."""
    minimum_detectable_bpb: float
    """ΔBPB that this many sentences would detect with 80 % power at α = 0.05."""
    perplexity_change_percent: float
    """Legacy: percent change of token perplexity."""
    fluency: Fluency | None = None
    """None in results that do not say. A weak language counts like a fluent one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A model state against the 16-bit model, language by language."""

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["measurement"] = "measurement"
    provenance: Provenance
    state: str
    part: Part
    """`all` also where the text set was too small to be split."""
    reference: str | None
    languages: tuple[LanguageDamage, ...]
    worst_kl: Number
    """Largest KL per byte over the supported languages."""
    mean_kl: Number
    mean_delta_bpb: Number
    held_out: bool | None = None
    """Whether neither calibration nor a search used these sentences; None where that is not known."""
    condition: str = ""
    """Why they are not held out, or why that is not known, as one sentence."""
    original_compared: bool | None = None
    """Of a checkpoint folder: whether the checksum in its record is that of the 16-bit model it was measured against;
    None where there is no folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionPlan:
    """Which units keep 16 bit, and which get 8 instead of 4.

    `units` maps `layers.<i>` to a precision, for every layer of the model; `layers.<i>.<unit>` overrides it for one
    fusion group, such as `layers.3.down`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["plan"] = "plan"
    model: str
    units: dict[str, Precision]
    grid: Grid
    source: str
    """`explicit`, `none`, `top 3 by worst`, `auto by worst under 20 % extra bytes`."""
    reasons: tuple[str, ...]
    stable: bool
    predicted: bool
    """True until the plan itself was evaluated on the confirm part."""
    extra_bytes: int
    overhead: float
    """`extra_bytes` over the bytes of the all-quantized checkpoint."""
    protect_columns: float = 0.0
    """Share of the input channels of each quantized module that keeps 16 bit beside the integers; in `extra_bytes`."""

    @classmethod
    def unprotected(cls, model: str, layers: int, grid: Grid) -> ProtectionPlan:
        """Return the plan that quantizes every layer of a model."""
        quantized = precision_of_bits(grid.bits)
        return cls(
            model=model,
            units={f"layers.{i}": quantized for i in range(layers)},
            grid=grid,
            source="none",
            reasons=(),
            stable=True,
            predicted=False,
            extra_bytes=0,
            overhead=0.0,
        )

    @property
    def protected_layers(self) -> tuple[int, ...]:
        """Layers that are wholly in 16 bit, ascending."""
        return tuple(i for i in range(self.layers) if self.units[f"layers.{i}"] == "fp16" and not self.overrides_in(i))

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return sum(name.count(".") == 1 for name in self.units)

    @property
    def quantized_precision(self) -> Precision:
        """What a layer gets that the plan does not single out."""
        return precision_of_bits(self.grid.bits)

    @property
    def overrides(self) -> dict[str, Precision]:
        """Units that get neither 16 bit as a whole layer nor the grid's own bits: `layers.5` or `layers.3.down`."""
        whole = {f"layers.{i}" for i in self.protected_layers}
        return {
            name: precision
            for name, precision in self.units.items()
            if name not in whole and (name.count(".") > 1 or precision != self.quantized_precision)
        }

    @property
    def singled_out(self) -> dict[str, Precision]:
        """Layers and units that get something else than the grid's own bits, whole layers in 16 bit included."""
        return {name: kind for name, kind in self.units.items() if kind != self.quantized_precision}

    def overrides_in(self, layer: int) -> dict[str, Precision]:
        """Fusion groups of a layer with a precision of their own, by name within the layer."""
        prefix = f"layers.{layer}."
        return {name.removeprefix(prefix): kind for name, kind in self.units.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """`quant_fairness.json`: what is in a checkpoint folder and how it was made."""

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["export"] = "export"
    provenance: Provenance
    method: str
    """Who computed the integers: a name of `quantize.methods.METHODS`."""
    format: CheckpointFormat
    plan: ProtectionPlan
    family: str
    quantized_modules: dict[str, int]
    """Full module name → bits."""
    kept_modules: dict[str, str]
    """Module in 16 bit although its layer is quantized → reason (for example a width that no group divides)."""
    linear_modules: int
    """How many linear modules the blocks have, quantized or not."""
    sixteen_bit_bytes: int
    """What all parameters would take in 16 bit."""
    calibration: dict[str, Any]
    measurement: Measurement | None
    group_sizes: dict[str, int] = field(default_factory=dict)
    """Quantized module → its group size, where it is not that of the plan's grid."""
    protected_columns: dict[str, int] = field(default_factory=dict)
    """Module → how many of its input channels are in `quant_fairness_columns.safetensors` too, in 16 bit."""
    copied_tensors: dict[str, str] = field(default_factory=dict)
    """Tensor in the files → checksum, of those that are the source's byte for byte, and were never computed with: parts
    that are not text, and what no module of the model has."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    experts: ExpertCoverage | None = None
    """Of a mixture of experts that was calibrated: the tokens of every language that reached each expert."""

    @property
    def sizes(self) -> dict[str, int]:
        """Group size of every quantized module."""
        return {name: self.group_sizes.get(name, self.plan.grid.group_size) for name in self.quantized_modules}

    @property
    def grids(self) -> str:
        """The grid with the group size of most modules, and how many modules have another: for people to read."""
        counts = Counter(self.sizes.values()).most_common()
        usual = counts[0][0] if counts else self.plan.grid.group_size
        others = [
            f"{count} of {len(self.quantized_modules)} modules {replace(self.plan.grid, group_size=size).groups}"
            for size, count in counts[1:]
        ]
        return " · ".join([str(replace(self.plan.grid, group_size=usual)), *others])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and checksum of one file of a checkpoint folder."""

    bytes_: int
    sha256: str


def precision_of_bits(bits: int) -> Precision:
    """The name of a bit width in a plan.

    Raises:
        ConfigError: a width without one (7).
    """
    names: dict[int, Precision] = {2: "int2", 3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8", 16: "fp16"}
    if bits not in names:
        raise ConfigError(f"{bits} bits have no name in a plan; use one of {', '.join(map(str, names))}")
    return names[bits]


def bits_of_precision(precision: Precision) -> int:
    """`int4` → 4, `fp16` → 16."""
    return 16 if precision == "fp16" else int(precision.removeprefix("int"))
