"""The seeds' claims of what goes with a language's damage, asked of one model: rank correlations over its languages.

Damage is KL in bits per byte with all layers rounded to nearest (or of a checkpoint), on the search part. A claim is
`supported` where the whole interval lies beyond the bound that the seeds gave, `not supported` where all of it lies
short of it, else `undecided`. Languages are few and related: correlation, no cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.analysis import representations, tokens
from quant_fairness_plugin.analysis.causes import kl_series, low_over_high
from quant_fairness_plugin.analysis.correlations import detectable_rho, over_items, partial, permutation_p, spearman
from quant_fairness_plugin.analysis.quantized import quantized_state
from quant_fairness_plugin.analysis.representations import PART
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.artifacts import Interval, LanguageDamage, Number, Undefined
from quant_fairness_plugin.measure.damage import measure_damage
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.resolve import BUNDLED
from quant_fairness_plugin.model.weights import read_json
from quant_fairness_plugin.plans.plan_set import BASELINE

DISPARITY_BOUND = 1.5
CORRELATION_BOUND = 0.7
"""Of the seeds' registry, H1 and H2 to H3."""
BRANCHES = {
    "en": "Germanic", "de": "Germanic", "nl": "Germanic", "sv": "Germanic", "fr": "Romance", "es": "Romance",
    "it": "Romance", "pt": "Romance", "ru": "Slavic", "uk": "Slavic", "pl": "Slavic", "cs": "Slavic",
    "he": "Semitic", "ar": "Semitic", "fi": "Uralic", "hu": "Uralic", "et": "Uralic", "hi": "Indo-Aryan",
}  # fmt: skip
"""Languages that count as one when a family is left out; any other is a family of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One figure of the languages against their damage."""

    figure: str
    claimed: str
    """The seeds' bound, with its sign."""
    languages: int
    rho: Number
    """Spearman's, with Fisher's interval over the languages."""
    permutation_p: float | Undefined
    given_baseline: float | Undefined
    """The same with the 16-bit model's bits per byte held fixed."""
    without_a_family: tuple[float, ...]
    """Lowest and highest where one family is left out."""
    detectable: float | Undefined
    verdict: str


@dataclass(frozen=True, slots=True)
class LanguageFigures:
    """What the claims are about, for one language; `figures` lacks what is not known of it."""

    language: str
    family: str
    kl: float
    baseline_bpb: float
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Hypotheses:
    """The answer of `analyze hypotheses`."""

    state: str
    low_over_high: Number
    disparity_verdict: str
    """Of the claim that low-resource languages lose more than 1.5 times as much."""
    claims: tuple[Claim, ...]
    languages: tuple[LanguageFigures, ...]


CLAIMS: Mapping[str, int] = {
    "tokens per byte": 1,
    "tokens per character": 1,
    "tokens that are part of a character": 1,
    "F1 of token and morpheme boundaries": -1,
    "share of outlier layers": -1,
    "effective kurtosis": 1,
    "share of training text": -1,
}
"""Figure → the sign of the correlation with damage that the seeds claim."""


def analyse(request: Request) -> Hypotheses:
    """Measure the damage and the figures of every language, and correlate them.

    Raises:
        ConfigError: a checkpoint of another model, or a grid that fits no module.
    """
    loaded, texts, bootstrap = request.load(), request.texts.part(PART), request.config.bootstrap
    state = quantized_state(loaded, request.config.fitted(loaded).grid, request.options.checkpoint)
    scores = score_states([fixed_state(BASELINE, loaded.model), state], loaded.tokenizer, texts)
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    damage = measure_damage(scores[BASELINE], scores[state.name], texts, vocabulary=vocabulary, bootstrap=bootstrap)
    known = [row for row in damage if row.status == "supported"]
    weights = Resamples.of(bootstrap, len(texts)).weights
    ratio = low_over_high(kl_series(scores[state.name], [row.language for row in known], weights))
    rows = languages(known, figures_of(request))
    return Hypotheses(
        state.name,
        ratio,
        verdict(ratio, DISPARITY_BOUND, 1),
        tuple(claim(name, sign, rows, seed=request.config.seed) for name, sign in CLAIMS.items()),
        rows,
    )


def figures_of(request: Request) -> dict[str, dict[str, float]]:
    """Return figure → language → value, of the languages where it is known."""
    counted, hidden = tokens.analyse(request), representations.analyse(request)
    aligned = {row.language: row.f1.estimate for row in counted.alignment if isinstance(row.f1, Interval)}
    return {
        "tokens per byte": {row.language: row.per_byte.estimate for row in counted.languages},
        "tokens per character": {row.language: row.per_character.estimate for row in counted.languages},
        "tokens that are part of a character": {row.language: row.byte_share.estimate for row in counted.languages},
        "F1 of token and morpheme boundaries": aligned,
        "share of outlier layers": {row.language: row.outlier_layers for row in hidden.languages},
        "effective kurtosis": {row.language: row.effective_kurtosis for row in hidden.languages},
        "share of training text": _training_shares(request),
    }


def languages(
    damage: Sequence[LanguageDamage], figures: Mapping[str, Mapping[str, float]]
) -> tuple[LanguageFigures, ...]:
    """Return every language's damage beside its figures."""
    return tuple(
        LanguageFigures(
            row.language,
            BRANCHES.get(row.language, row.language),
            row.kl_bits_per_byte.estimate,
            row.baseline_bpb,
            {name: values[row.language] for name, values in figures.items() if row.language in values},
        )
        for row in damage
    )


def claim(name: str, sign: int, rows: Sequence[LanguageFigures], *, seed: int) -> Claim:
    """Correlate one figure with the damage, over the languages that have it."""
    known = [row for row in rows if name in row.figures]
    values, damage = [row.figures[name] for row in known], [row.kl for row in known]
    rho = spearman(values, damage) if len(known) > 1 else Undefined(f"{len(known)} language(s) have it")
    interval: Number = rho if isinstance(rho, Undefined) else over_items(rho, len(known))
    baseline = [row.baseline_bpb for row in known]
    unknown = isinstance(rho, Undefined)
    return Claim(
        figure=name,
        claimed=f"{'above' if sign > 0 else 'below'} {sign * CORRELATION_BOUND:g}",
        languages=len(known),
        rho=interval,
        permutation_p=rho if isinstance(rho, Undefined) else permutation_p(values, damage, seed=seed),
        given_baseline=rho if isinstance(rho, Undefined) else partial(values, damage, baseline),
        without_a_family=() if unknown else _without_a_family(name, known),
        detectable=detectable_rho(len(known)),
        verdict=verdict(interval, CORRELATION_BOUND, sign),
    )


def verdict(value: Number, bound: float, sign: int) -> str:
    """Return whether a claim holds that a figure, times its sign, is above a bound."""
    if isinstance(value, Undefined):
        return "undecided"
    low, high = sorted((sign * value.low, sign * value.high))
    return "supported" if low > bound else "not supported" if high < bound else "undecided"


def _without_a_family(name: str, rows: Sequence[LanguageFigures]) -> tuple[float, ...]:
    correlations = []
    for family in {row.family for row in rows}:
        rest = [row for row in rows if row.family != family]
        rho = spearman([row.figures[name] for row in rest], [row.kl for row in rest])
        correlations += [] if isinstance(rho, Undefined) else [significant(rho)]
    return (min(correlations), max(correlations)) if correlations else ()


def _training_shares(request: Request) -> dict[str, float]:
    """Return the shares of the languages that a bundled model says it was trained on; else none are known."""
    if request.files.name not in BUNDLED:
        return {}
    mixture = read_json(request.files.folder / "training.json")["mixture"]
    return {str(language): float(share) for language, share in mixture.items()}
