"""What a model state scores sentence by sentence, and what it lost against the 16-bit model, language by language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.answers import Answers
from quant_fairness_plugin.artifacts.names import Fluency, Part, Status
from quant_fairness_plugin.artifacts.numbers import Interval, Number, Undefined
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES, Provenance


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
    unknown: int = 0
    """Tokens of all sentences that stand for text which the tokenizer cannot spell."""


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
    disparity: Number | None = None
    """Mean KL of the other supported languages over that of the reference; None in results that do not say."""
    held_out: bool | None = None
    """Whether neither calibration nor a search used these sentences; None where that is not known."""
    condition: str = ""
    """Why they are not held out, or why that is not known, as one sentence."""
    original_compared: bool | None = None
    """Of a checkpoint folder: whether the checksum in its record is that of the 16-bit model it was measured against;
    None where there is no folder."""
    answers: Answers | Undefined | None = None
    """What a checkpoint folder answered to a few prompts, or why it was not asked; None where there is no folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAndAfter:
    """A checkpoint's measurement, with that of the same quantization without protection, on the same sentences."""

    unprotected: Measurement
    protected: Measurement
