"""Step 3 of 8: what quantization did to each language, and the objectives that layers are ranked by.

Takes the `StateScores` of the 16-bit model and of another state, sentence by sentence; returns `LanguageDamage` per
language, the summaries of a `Measurement`, and objective values per resample. No model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from quant_fairness_plugin.artifacts import (
    LanguageDamage,
    Number,
    Objective,
    StateScores,
    Status,
    TextSet,
    Undefined,
)
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.measure import guards, metrics
from quant_fairness_plugin.measure.intervals import (
    Resamples,
    benjamini_hochberg,
    interval,
    intervals,
    minimum_detectable,
    p_values,
    ratio_interval,
    ratio_intervals,
    weighted_sums,
)
from quant_fairness_plugin.measure.metrics import Array, significant

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
RELATIVE_OBJECTIVES: tuple[Objective, ...] = ("excess", "disparity")
"""Those that need a reference language, and that fall when it is hurt: reported, never the default."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The three figures of a `Measurement`, over its supported languages."""

    worst_kl: Number
    mean_kl: Number
    mean_delta_bpb: Number


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over sentences, [rows, languages] each: one row per weighting of the sentences, one column per language."""

    bytes_: Array
    tokens: Array
    baseline_nats: Array
    delta_nats: Array
    kl_nats: Array
    flips: Array

    @property
    def delta_bpb(self) -> Array:
        return metrics.bits_per_byte(self.delta_nats, self.bytes_)

    @property
    def kl_bpb(self) -> Array:
        return metrics.kl_bits_per_byte(self.kl_nats, self.bytes_)

    @property
    def flip_rate(self) -> Array:
        return metrics.flip_rate(self.flips, self.tokens)


def measure_damage(
    baseline: StateScores,
    state: StateScores,
    texts: TextSet,
    *,
    reference: str | None,
    vocabulary: int,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[LanguageDamage, ...]:
    """What `state` costs each language against `baseline`, with intervals and a status.

    Every language of the text set is reported. `unsupported` (the 16-bit model does not know it) and `collapsed` (the
    quantized model is no better than chance) mean that its figures must not be summarised or ranked.

    Args:
        baseline: scores of the 16-bit model.
        state: scores of the other state, on the same sentences.
        texts: those sentences.
        reference: language that excess and disparity are measured against; None leaves them undefined.
        vocabulary: entries of the model's vocabulary.
        draws: bootstrap resamples of the sentences.
        seed: of the resampling.

    Raises:
        UnknownLanguageError: the reference is not in the text set.
        ConfigError: the two states were scored on different sentences, or on fewer than two.
    """
    languages = texts.languages
    if reference is not None and reference not in languages:
        raise UnknownLanguageError(
            f"reference language {reference!r} is not in the text set; it has {', '.join(languages)}. "
            "Name one of these, or none to report damage only."
        )
    sums = _weighted_sums(baseline, state, languages, Resamples(len(texts), draws, seed).weights)
    statuses = [_status(sums, i, texts.sentences[name], vocabulary) for i, name in enumerate(languages)]
    excess, disparity = _against_reference(sums, languages, statuses, reference)
    delta_bpb = intervals(sums.delta_bpb)
    kl_bpb = intervals(sums.kl_bpb)
    delta_nats = intervals(sums.delta_nats / len(texts))
    flip_rate = intervals(sums.flip_rate)
    adjusted = benjamini_hochberg(p_values(sums.delta_bpb[1:]).tolist())
    detectable = minimum_detectable(sums.delta_bpb[1:]).tolist()
    rows = []
    for i, language in enumerate(languages):
        before, after, bytes_, tokens = _levels(sums, i)
        row = LanguageDamage(
            language=language,
            status=statuses[i][0],
            reason=statuses[i][1],
            sentences=len(texts),
            tokens=round(tokens),
            bytes_=round(bytes_),
            baseline_bpb=significant(metrics.bits_per_byte(before, bytes_)),
            quantized_bpb=significant(metrics.bits_per_byte(after, bytes_)),
            delta_bpb=delta_bpb[i],
            kl_bits_per_byte=kl_bpb[i],
            delta_nats_per_sentence=delta_nats[i],
            flip_rate=flip_rate[i],
            excess_bpb=excess[i],
            disparity=disparity[i],
            adjusted_p=significant(adjusted[i]),
            minimum_detectable_bpb=significant(detectable[i]),
            perplexity_change_percent=significant(metrics.perplexity_change_percent(after - before, tokens)),
        )
        rows.append(row)
    return tuple(rows)


def supported_languages(damage: Sequence[LanguageDamage]) -> tuple[str, ...]:
    """Languages whose figures may be summarised and ranked: neither unsupported nor collapsed."""
    return tuple(row.language for row in damage if row.status == "supported")


def summarise(
    baseline: StateScores, state: StateScores, damage: Sequence[LanguageDamage], *, draws: int = 2000, seed: int = 0
) -> Summary:
    """Worst and mean damage over the supported languages, or undefined where there is none.

    A maximum is taken again inside every resample, so that its interval includes the doubt about which language is
    worst. Collapsed languages are left out: read the summary together with the statuses.
    """
    languages = supported_languages(damage)
    if not languages:
        nothing = Undefined("no language is supported by the 16-bit model and intact in the quantized one")
        return Summary(nothing, nothing, nothing)
    sums = _weighted_sums(baseline, state, languages, Resamples(_sentences(baseline), draws, seed).weights)
    worst, mean, bpb = (_objective_number(sums, languages, name, None) for name in ("worst", "mean", "bpb"))
    return Summary(worst, mean, bpb)


def objective_values(
    baseline: StateScores,
    state: StateScores,
    damage: Sequence[LanguageDamage],
    *,
    reference: str | None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Number]:
    """Every ranking objective of a state by name; lower is better.

    All are undefined where a language collapsed: without it the state would look better than one that kept it.
    """
    languages = supported_languages(damage)
    collapsed = [row.language for row in damage if row.status == "collapsed"]
    if collapsed:
        return dict.fromkeys(OBJECTIVES, Undefined(f"collapsed in {', '.join(collapsed)}: the state is not ranked"))
    if not languages:
        return dict.fromkeys(OBJECTIVES, Undefined("the 16-bit model supports none of the languages"))
    sums = _weighted_sums(baseline, state, languages, Resamples(_sentences(baseline), draws, seed).weights)
    return {name: _objective_number(sums, languages, name, reference) for name in OBJECTIVES}


def objective_draws(
    baseline: StateScores,
    state: StateScores,
    languages: Sequence[str],
    *,
    objective: Objective,
    reference: str | None,
    weights: Array,
) -> Array:
    """An objective under each weighting of the sentences, for ranking states; lower is better.

    `worst` and `mean` are the largest and mean KL in bits per byte, `bpb` the mean ΔBPB, all over `languages`, the
    reference included. `excess` is the largest ΔBPB of the others minus the reference's, `disparity` their mean ΔBPB
    over the reference's.

    Args:
        baseline: scores of the 16-bit model.
        state: scores of the state to rank.
        languages: those that count; the same for all states that are compared.
        objective: its name.
        reference: needed by `excess` and `disparity` only.
        weights: [rows, sentences]: `Resamples.counts`, or 0/1 rows that pick a half of the sentences.

    Returns:
        [rows]; NaN where a disparity is undefined because the reference did not lose anything.

    Raises:
        ConfigError: an unknown objective, no language, or no reference where one is needed.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective {objective!r} is not known; use one of {', '.join(OBJECTIVES)}")
    if not languages:
        raise ConfigError("no language to rank by: the 16-bit model supports none of them, or none was given")
    if objective in RELATIVE_OBJECTIVES and (problem := _relative_problem(languages, reference)):
        raise ConfigError(f"objective {objective!r} cannot be computed: {problem}. Use worst, mean or bpb.")
    sums = _weighted_sums(baseline, state, tuple(languages), weights)
    if objective != "disparity":
        return _objective_series(sums, languages, objective, reference)
    others, own = _others_and_own(sums.delta_bpb, languages, reference)
    series: Array = np.divide(others.mean(axis=1), own, out=np.full(len(own), np.nan), where=own > 0)
    return series


def _objective_series(sums: _Sums, languages: Sequence[str], objective: Objective, reference: str | None) -> Array:
    match objective:
        case "worst":
            series: Array = sums.kl_bpb.max(axis=1)
        case "mean":
            series = sums.kl_bpb.mean(axis=1)
        case "bpb":
            series = sums.delta_bpb.mean(axis=1)
        case _:
            others, own = _others_and_own(sums.delta_bpb, languages, reference)
            series = others.max(axis=1) - own
    return series


def _objective_number(sums: _Sums, languages: Sequence[str], objective: Objective, reference: str | None) -> Number:
    """The same with an interval; row 0 of the sums is the estimate, the others are resamples."""
    if objective in RELATIVE_OBJECTIVES and (problem := _relative_problem(languages, reference)):
        return Undefined(problem)
    if objective != "disparity":
        return interval(_objective_series(sums, languages, objective, reference))
    others, own = _others_and_own(sums.delta_bpb, languages, reference)
    return ratio_interval(others.mean(axis=1), own, what=_change_of(reference))


def _relative_problem(languages: Sequence[str], reference: str | None) -> str:
    if reference is None:
        return "no reference language was given"
    if reference not in languages:
        return f"the reference language {reference} is not among the supported languages"
    return "" if len(languages) > 1 else f"there is no language besides the reference {reference}"


def _others_and_own(values: Array, languages: Sequence[str], reference: str | None) -> tuple[Array, Array]:
    """The columns of the other languages [rows, languages - 1] and the reference's own [rows]."""
    mine = np.array([language == reference for language in languages])
    return values[:, ~mine], values[:, mine][:, 0]


def _against_reference(
    sums: _Sums, languages: Sequence[str], statuses: Sequence[tuple[Status, str]], reference: str | None
) -> tuple[tuple[Number, ...], tuple[Number, ...]]:
    """Excess and disparity of every language."""
    reason = "no reference language was given"
    if reference is not None:
        status = statuses[languages.index(reference)][0]
        reason = "" if status == "supported" else f"the reference language {reference} is {status}"
    if reference is None or reason:
        return ((Undefined(reason),) * len(languages),) * 2
    delta = sums.delta_bpb
    own = delta[:, languages.index(reference)]
    return intervals(delta - own[:, None]), ratio_intervals(delta, own, what=_change_of(reference))


def _change_of(language: str | None) -> str:
    return f"the change of {language} in bits per byte"


def _status(sums: _Sums, column: int, sentences: Sequence[str], vocabulary: int) -> tuple[Status, str]:
    """Support comes first: a language that the 16-bit model does not know cannot be said to have collapsed."""
    before, after, bytes_, tokens = _levels(sums, column)
    reason = guards.support(metrics.bits_per_byte(before, bytes_), guards.byte_unigram_bpb(sentences))
    if reason:
        return "unsupported", reason
    reason = guards.collapse(
        nats_per_token=metrics.nats_per_token(after, tokens),
        bits_per_byte=metrics.bits_per_byte(after, bytes_),
        perplexity=metrics.perplexity(after, tokens),
        baseline_perplexity=metrics.perplexity(before, tokens),
        vocabulary=vocabulary,
    )
    return ("collapsed", reason) if reason else ("supported", "")


def _levels(sums: _Sums, column: int) -> tuple[float, float, float, float]:
    """Nats before and after, bytes and tokens of a language, over all sentences once."""
    before = float(sums.baseline_nats[0, column])
    after = before + float(sums.delta_nats[0, column])
    return before, after, float(sums.bytes_[0, column]), float(sums.tokens[0, column])


def _sentences(scores: StateScores) -> int:
    return len(next(iter(scores.languages.values())).tokens)


def _weighted_sums(baseline: StateScores, state: StateScores, languages: Sequence[str], weights: Array) -> _Sums:
    """All sums of all languages under all weightings, by one matrix product."""
    _check_same_sentences(baseline, state, languages, weights.shape[1])
    before = [baseline.languages[language] for language in languages]
    after = [state.languages[language] for language in languages]
    old, new = np.array([row.nll_nats for row in before]), np.array([row.nll_nats for row in after])
    counts = (np.array([row.bytes_ for row in before]), np.array([row.tokens for row in before]))
    changes = (np.array([row.kl_nats for row in after]), np.array([row.flips for row in after]))
    stacked = np.concatenate([*counts, old, new - old, *changes])  # [6 · languages, sentences]
    return _Sums(*np.split(weighted_sums(weights, stacked.T.astype(np.float64)), 6, axis=1))


def _check_same_sentences(baseline: StateScores, state: StateScores, languages: Sequence[str], sentences: int) -> None:
    for language in languages:
        before, after = baseline.languages.get(language), state.languages.get(language)
        if before is None or after is None:
            lacking = baseline.state if before is None else state.state
            raise ConfigError(f"state {lacking!r} has no scores of {language}; score all states on the same text set")
        if before.tokens != after.tokens or before.bytes_ != after.bytes_ or len(before.tokens) != sentences:
            raise ConfigError(
                f"states {baseline.state!r} and {state.state!r} were scored on different sentences of {language} "
                f"({len(before.tokens)} and {len(after.tokens)}, {sentences} expected); score both on the same text set"
            )
