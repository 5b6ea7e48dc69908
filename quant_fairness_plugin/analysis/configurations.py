"""The seeds' table of configurations, measured: bytes, damage, disparity, labels, and what each is good for.

All plans are scored in one walk on the same sentences, rounded to nearest on the grid. The seeds' figures of merit
(disparity, its label, Fair-Efficiency) stand beside KL of the worst language, by which a plan should be chosen: the
former get better when the reference language is hurt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from quant_fairness_plugin.analysis.causes import Series, kl_series
from quant_fairness_plugin.analysis.named_plans import GATEWAYS, NOTHING, NamedPlan, bytes_of, named_plans
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.artifacts import (
    Interval,
    LanguageDamage,
    Number,
    Part,
    StateScores,
    Undefined,
)
from quant_fairness_plugin.measure.damage import mean_disparity, measure_damage, supported_languages
from quant_fairness_plugin.measure.intervals import Resamples, interval, ratio_interval
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.statistics.labels import (
    fair_efficiency_score,
    label,
    legacy_label,
    throughput_over_disparity,
)
from quant_fairness_plugin.sweep.bank import RtnBank, check_bank_fits
from quant_fairness_plugin.sweep.walk import score_plans
from quant_fairness_plugin.texts.languages import script_name

PART: Part = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One configuration, all supported languages together."""

    kept: str
    """What is not rounded to the grid: 16 bit, or INT8 where the name says so."""
    layers: tuple[int, ...]
    bytes_: int | Undefined
    """Of all tensors of the checkpoint."""
    of_16_bit: float | Undefined
    worst_kl: Number
    disparity: Number
    """Mean over the other languages of their KL over that of the reference."""
    legacy_label: str
    """The research scripts' label of that estimate."""
    label: str
    """What its interval says."""
    per_disparity: Number
    """Fair-Efficiency, throughput / disparity. Throughput: 16-bit bytes over bytes, which is how many times fewer
    bytes are read, and an upper bound of how many times faster decoding is."""
    score: Number
    """Fair-Efficiency, sqrt(throughput × min(1, 1 / disparity))."""
    use: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageRow:
    """One language under a configuration, as the seeds tabled it."""

    kept: str
    language: str
    script: str
    tokens: int
    """Of all sentences."""
    kl: Interval
    perplexity_change_percent: float
    """The seeds' degradation."""
    relative: Number
    """KL over that of the reference language: its disparity."""
    legacy_label: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Configurations:
    """The answer of `analyze configurations`."""

    reference: str | None
    configurations: tuple[Configuration, ...]
    languages: tuple[LanguageRow, ...]
    """Under no protection, and with the first, the three-quarter and the last layer kept."""
    scores: dict[str, StateScores]
    """Configuration → per-sentence scores, on the search part."""


def analyse(request: Request) -> Configurations:
    """Score every configuration on the search part.

    Raises:
        ConfigError: a grid that fits no module.
    """
    loaded, texts = request.load(), request.texts.part(PART)
    units, grid, seed = map_units(loaded), request.config.fitted(loaded).grid, request.config.seed
    quantized, bank = grid.precision, RtnBank(loaded, units, grid)
    check_bank_fits(bank, units, quantized)
    plans = named_plans(loaded, units, grid, seed=seed)
    precisions = {plan.name: plan.precisions(units, quantized) for plan in plans}
    scores = score_plans(loaded, precisions, texts, units=units, bank=bank, progress=request.progress)
    bootstrap, vocabulary = request.config.bootstrap, int(loaded.model.config.get_text_config().vocab_size)
    weights = Resamples.of(bootstrap, len(texts)).weights
    sizes, sixteen = bytes_of(plans, loaded, grid)
    rows, languages = [], []
    for plan, size in zip(plans, sizes, strict=True):
        damage = measure_damage(scores[BASELINE], scores[plan.name], texts, vocabulary=vocabulary, bootstrap=bootstrap)
        series = kl_series(scores[plan.name], supported_languages(damage), weights)
        rows.append(_row(plan, size, sixteen, series, damage, bootstrap.reference))
        if plan.name in (NOTHING, GATEWAYS):
            languages += [_language(plan, row, series, bootstrap.reference) for row in damage]
    return Configurations(
        reference=bootstrap.reference,
        configurations=tuple(with_uses(rows)),
        languages=tuple(languages),
        scores=scores,
    )


def _row(
    plan: NamedPlan,
    size: int | Undefined,
    sixteen: int,
    series: Series,
    damage: Sequence[LanguageDamage],
    reference: str | None,
) -> Configuration:
    lost = [row.language for row in damage if row.status == "collapsed"]
    disparity: Number = Undefined(f"collapsed in {', '.join(lost)}") if lost else mean_disparity(series, reference)
    worst: Number = Undefined(f"collapsed in {', '.join(lost)}" if lost else "the 16-bit model supports no language")
    if series and not lost:
        worst = interval(np.array(list(series.values())).max(axis=0))
    share = size if isinstance(size, Undefined) else round(size / sixteen, 6)
    throughput = share if isinstance(share, Undefined) else 1 / share
    return Configuration(
        kept=plan.name,
        layers=plan.layers,
        bytes_=size,
        of_16_bit=share,
        worst_kl=worst,
        disparity=disparity,
        legacy_label=legacy_label(disparity),
        label=label(disparity),
        per_disparity=throughput
        if isinstance(throughput, Undefined)
        else throughput_over_disparity(throughput, disparity),
        score=throughput if isinstance(throughput, Undefined) else fair_efficiency_score(throughput, disparity),
        use="",
    )


def with_uses(rows: Sequence[Configuration]) -> list[Configuration]:
    """Return the rows with what they are for: those that no row beats at as few bytes are worth their own."""
    return [replace(row, use=_use(row, rows)) for row in rows]


def _use(row: Configuration, rows: Sequence[Configuration]) -> str:
    if isinstance(row.bytes_, Undefined):
        return "simulation only"
    if not isinstance(row.worst_kl, Interval):
        return "collapsed: none"
    better = [
        other
        for other in rows
        if isinstance(other.bytes_, int)
        and isinstance(other.worst_kl, Interval)
        and other.bytes_ <= row.bytes_
        and other.worst_kl.estimate < row.worst_kl.estimate
    ]
    if not better:
        return "worth its bytes"
    best = min(better, key=lambda other: other.worst_kl.estimate)  # type: ignore[union-attr] # intervals, see above
    return f"rather keep {best.kept}"


def _language(plan: NamedPlan, row: LanguageDamage, series: Series, reference: str | None) -> LanguageRow:
    relative: Number = Undefined(row.reason or f"the reference {reference} is not supported")
    if row.language in series and reference is not None and reference in series:
        relative = ratio_interval(series[row.language], series[reference], what=f"the KL of {reference}")
    itself = row.language == reference
    return LanguageRow(
        kept=plan.name,
        language=row.language,
        script=script_name(row.language),
        tokens=row.tokens,
        kl=row.kl_bits_per_byte,
        perplexity_change_percent=row.perplexity_change_percent,
        relative=relative,
        legacy_label="Reference" if itself else legacy_label(relative),
        label="reference" if itself else label(relative),
    )
