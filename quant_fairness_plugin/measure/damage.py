"""What quantization did to each language, and the value of every objective, from per-sentence scores alone.

Takes the `StateScores` of the 16-bit model and of another state; returns `LanguageDamage` per language, the summaries
of a `Measurement`, and objectives per resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Fluency,
    Interval,
    LanguageDamage,
    Number,
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
from quant_fairness_plugin.measure.objectives import OBJECTIVES, Objective, find_objective


@dataclass(frozen=True, slots=True)
class Summary:
    """Four figures of a `Measurement`, over its supported languages."""

    worst_kl: Number
    mean_kl: Number
    mean_delta_bpb: Number
    disparity: Number


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

    def figure(self, objective: Objective) -> Array:
        """What an objective is made of, [rows, languages]."""
        return self.kl_bpb if objective.figure == "kl" else self.delta_bpb


def measure_damage(
    baseline: StateScores, state: StateScores, texts: TextSet, *, vocabulary: int, bootstrap: Bootstrap
) -> tuple[LanguageDamage, ...]:
    """Return what `state` costs each language against `baseline`, with intervals and a status.

    Every language of the text set is reported. `unsupported` (the 16-bit model does not know it, or its tokenizer
    cannot spell it) and `collapsed` (the quantized model is no better than chance) mean that its figures must not be
    summarised or ranked.

    Args:
        baseline: scores of the 16-bit model.
        state: scores of the other state, on the same sentences.
        texts: those sentences.
        vocabulary: entries of the model's vocabulary.
        bootstrap: resamples of the sentences; without a reference, excess and disparity are undefined.

    Raises:
        UnknownLanguageError: the reference is not in the text set.
        ConfigError: the two states were scored on different sentences, or on fewer than two.
    """
    languages, reference = texts.languages, bootstrap.reference
    if reference is not None and reference not in languages:
        raise UnknownLanguageError(
            f"reference language {reference!r} is not in the text set; it has {', '.join(languages)}. "
            "Name one of these, or none to report damage only."
        )
    sums = _weighted_sums(baseline, state, languages, Resamples.of(bootstrap, len(texts)).weights)
    unknown = [baseline.languages[name].unknown for name in languages]
    statuses = [_status(sums, i, texts.sentences[name], vocabulary, unknown[i]) for i, name in enumerate(languages)]
    figures = _Figures.of(sums, len(texts), _against_reference(sums, languages, statuses, reference))
    return tuple(_row(sums, figures, i, language, statuses[i]) for i, language in enumerate(languages))


@dataclass(frozen=True, slots=True)
class _Figures:
    """The figures of `LanguageDamage` that are made for all languages at once, one entry per language each."""

    sentences: int
    delta_bpb: tuple[Interval, ...]
    kl_bpb: tuple[Interval, ...]
    delta_nats: tuple[Interval, ...]
    flip_rate: tuple[Interval, ...]
    excess: tuple[Number, ...]
    disparity: tuple[Number, ...]
    adjusted_p: tuple[float, ...]
    detectable: tuple[float, ...]

    @classmethod
    def of(cls, sums: _Sums, sentences: int, relative: tuple[tuple[Number, ...], tuple[Number, ...]]) -> _Figures:
        return cls(
            sentences=sentences,
            delta_bpb=intervals(sums.delta_bpb),
            kl_bpb=intervals(sums.kl_bpb),
            delta_nats=intervals(sums.delta_nats / sentences),
            flip_rate=intervals(sums.flip_rate),
            excess=relative[0],
            disparity=relative[1],
            adjusted_p=benjamini_hochberg(p_values(sums.delta_bpb[1:]).tolist()),
            detectable=tuple(minimum_detectable(sums.delta_bpb[1:]).tolist()),
        )


_Standing = tuple[Status, str, Fluency]
"""Whether a language counts, why not or only weakly, and how well the 16-bit model speaks it."""


def _row(sums: _Sums, figures: _Figures, i: int, language: str, status: _Standing) -> LanguageDamage:
    before, after, bytes_, tokens = _levels(sums, i)
    return LanguageDamage(
        language=language,
        status=status[0],
        reason=status[1],
        fluency=status[2],
        sentences=figures.sentences,
        tokens=round(tokens),
        bytes_=round(bytes_),
        baseline_bpb=significant(metrics.bits_per_byte(before, bytes_)),
        quantized_bpb=significant(metrics.bits_per_byte(after, bytes_)),
        delta_bpb=figures.delta_bpb[i],
        kl_bits_per_byte=figures.kl_bpb[i],
        delta_nats_per_sentence=figures.delta_nats[i],
        flip_rate=figures.flip_rate[i],
        excess_bpb=figures.excess[i],
        disparity=figures.disparity[i],
        adjusted_p=significant(figures.adjusted_p[i]),
        minimum_detectable_bpb=significant(figures.detectable[i]),
        perplexity_change_percent=significant(metrics.perplexity_change_percent(after - before, tokens)),
    )


def supported_languages(damage: Sequence[LanguageDamage]) -> tuple[str, ...]:
    """Return the languages whose figures may be summarised and ranked: neither unsupported nor collapsed."""
    return tuple(row.language for row in damage if row.status == "supported")


def summarise(
    baseline: StateScores, state: StateScores, damage: Sequence[LanguageDamage], *, bootstrap: Bootstrap
) -> Summary:
    """Return worst and mean damage over the supported languages, or undefined where there is none.

    A maximum is taken again inside every resample, so that its interval includes the doubt about which language is
    worst. Collapsed languages are left out: read the summary together with the statuses.
    """
    languages = supported_languages(damage)
    if not languages:
        nothing = Undefined("no language is supported by the 16-bit model and intact in the quantized one")
        return Summary(nothing, nothing, nothing, nothing)
    sums = _resampled(baseline, state, languages, bootstrap)
    worst, mean, bpb = (_number(sums, languages, find_objective(name), None) for name in ("worst", "mean", "bpb"))
    disparity = mean_disparity(dict(zip(languages, sums.kl_bpb.T, strict=True)), bootstrap.reference)
    return Summary(worst, mean, bpb, disparity)


def mean_disparity(kl: Mapping[str, Array], reference: str | None) -> Number:
    """Return the mean of the other languages' KL over the reference's; undefined without them.

    Args:
        kl: language → KL in bits per byte, `[1 + draws]`, the estimate first.
        reference: the language that the others are set against.
    """
    others = [values for language, values in kl.items() if language != reference]
    if reference is None or reference not in kl or not others:
        return Undefined(f"the reference {reference} and another language are needed; supported: {', '.join(kl)}")
    return ratio_interval(np.mean(others, axis=0), kl[reference], what=f"the KL of {reference}")


def objective_values(
    baseline: StateScores, state: StateScores, damage: Sequence[LanguageDamage], *, bootstrap: Bootstrap
) -> dict[str, Number]:
    """Return every objective of a state by name; lower is better.

    All are undefined where a language collapsed: without it the state would look better than one that preserved it.
    """
    languages = supported_languages(damage)
    collapsed = [row.language for row in damage if row.status == "collapsed"]
    if collapsed:
        return dict.fromkeys(OBJECTIVES, Undefined(f"collapsed in {', '.join(collapsed)}: the state is not ranked"))
    if not languages:
        return dict.fromkeys(OBJECTIVES, Undefined("the 16-bit model supports none of the languages"))
    sums = _resampled(baseline, state, languages, bootstrap)
    return {name: _number(sums, languages, record, bootstrap.reference) for name, record in OBJECTIVES.items()}


def objective_draws(
    baseline: StateScores,
    state: StateScores,
    languages: Sequence[str],
    *,
    objective: str,
    reference: str | None,
    weights: Array,
) -> Array:
    """Return an objective under each weighting of the sentences, for ranking states; lower is better.

    Args:
        baseline: scores of the 16-bit model.
        state: scores of the state to rank.
        languages: those that count; the same for all states that are compared.
        objective: its name in `OBJECTIVES`.
        reference: for objectives that need one.
        weights: [rows, sentences]: `Resamples.counts`, or 0/1 rows that pick a half of the sentences.

    Returns:
        [rows]; NaN where a disparity is undefined because the reference did not lose anything.

    Raises:
        ConfigError: an unknown objective, no language, or no reference where one is needed.
    """
    record = find_objective(objective)
    if not languages:
        raise ConfigError("no language to rank by: the 16-bit model supports none of them, or none was given")
    if problem := record.problem(languages, reference):
        raise ConfigError(f"objective {objective!r} cannot be computed: {problem}. Use worst, mean or bpb.")
    sums = _weighted_sums(baseline, state, tuple(languages), weights)
    return record.series(sums.figure(record), languages, reference)


def count_sentences(state: StateScores) -> int:
    """Return how many sentences of each language a state was scored on."""
    return len(next(iter(state.languages.values())).tokens)


def _number(sums: _Sums, languages: Sequence[str], objective: Objective, reference: str | None) -> Number:
    """An objective with its interval; row 0 of the sums is the estimate, the others are resamples."""
    if problem := objective.problem(languages, reference):
        return Undefined(problem)
    figures = sums.figure(objective)
    if objective.against != "ratio":
        return interval(objective.series(figures, languages, reference))
    value, base = objective.terms(figures, languages, reference)
    assert base is not None
    return ratio_interval(value, base, what=_change_of(reference))


def _resampled(baseline: StateScores, state: StateScores, languages: Sequence[str], bootstrap: Bootstrap) -> _Sums:
    weights = Resamples.of(bootstrap, count_sentences(baseline)).weights
    return _weighted_sums(baseline, state, languages, weights)


def _against_reference(
    sums: _Sums, languages: Sequence[str], statuses: Sequence[_Standing], reference: str | None
) -> tuple[tuple[Number, ...], tuple[Number, ...]]:
    """Excess and disparity of every language."""
    reason = "no reference language was given"
    if reference is not None:
        status = statuses[languages.index(reference)][0]
        reason = "" if status == "supported" else f"the reference language {reference} is {status}"
    if reference is None or reason:
        return ((Undefined(reason),) * len(languages),) * 2
    delta = sums.delta_bpb
    base = delta[:, languages.index(reference)]
    return intervals(delta - base[:, None]), ratio_intervals(delta, base, what=_change_of(reference))


def _change_of(language: str | None) -> str:
    return f"the change of {language} in bits per byte"


def _status(sums: _Sums, column: int, sentences: Sequence[str], vocabulary: int, unknown: int) -> _Standing:
    """Support comes first: a language that the 16-bit model does not know cannot be said to have collapsed."""
    before, after, bytes_, tokens = _levels(sums, column)
    bits = metrics.bits_per_byte(before, bytes_)
    reason = guards.spelling(unknown, round(tokens)) or guards.support(bits, guards.byte_unigram_bpb(sentences))
    if reason:
        return "unsupported", reason, "none"
    weakness = guards.weakness(bits, guards.byte_ngram_bpb(sentences))
    fluency: Fluency = "fluent" if weakness is None else "weak"
    reason = guards.collapse(
        nats_per_token=metrics.nats_per_token(after, tokens),
        bits_per_byte=metrics.bits_per_byte(after, bytes_),
        perplexity=metrics.perplexity(after, tokens),
        baseline_perplexity=metrics.perplexity(before, tokens),
        vocabulary=vocabulary,
    )
    return ("collapsed", reason, fluency) if reason else ("supported", weakness or "", fluency)


def _levels(sums: _Sums, column: int) -> tuple[float, float, float, float]:
    """Nats before and after, bytes and tokens of a language, over all sentences once."""
    before = float(sums.baseline_nats[0, column])
    after = before + float(sums.delta_nats[0, column])
    return before, after, float(sums.bytes_[0, column]), float(sums.tokens[0, column])


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
