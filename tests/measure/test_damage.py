from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Bootstrap, Interval, LanguageDamage, Number, StateScores, Undefined
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.measure.damage import (
    mean_disparity,
    measure_damage,
    objective_draws,
    objective_values,
    summarise,
    supported_languages,
)
from quant_fairness_plugin.measure.guards import byte_ngram_bpb
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from tests.measure.samples import make_scores, numbered_texts

TEXTS = numbered_texts(40)
BASE = {"en": 1.0, "he": 1.5, "ar": 2.0}
BASELINE = make_scores("16 bit", TEXTS, BASE)


def noisy(mean: float, seed: int, noise: float = 0.3) -> list[float]:
    """One value per sentence around a mean."""
    return (mean * (1 + noise * np.random.default_rng(seed).standard_normal(len(TEXTS)))).tolist()


def changed(changes: dict[str, float], kl: dict[str, float] | None = None, name: str = "none") -> StateScores:
    """A state whose BPB differs from the baseline's by noisy amounts around `changes`; KL defaults to twice that."""
    bits = {
        language: [BASE[language] + step for step in noisy(changes[language], seed)]
        for seed, language in enumerate(TEXTS.languages)
    }
    means = kl or {language: 2 * abs(change) for language, change in changes.items()}
    divergence = {language: noisy(means[language], 7 + seed, 0.1) for seed, language in enumerate(TEXTS.languages)}
    return make_scores(name, TEXTS, bits, kl_bits_per_byte=divergence)


def measure(state: StateScores, *, reference: str | None = "en", draws: int = 500) -> dict[str, LanguageDamage]:
    rows = measure_damage(BASELINE, state, TEXTS, vocabulary=4096, bootstrap=Bootstrap(reference, draws))
    return {row.language: row for row in rows}


def known(number: Number) -> Interval:
    assert isinstance(number, Interval)
    return number


def why(number: Number) -> str:
    assert isinstance(number, Undefined)
    return number.undefined


PLANTED = changed({"en": 0.02, "he": 0.08, "ar": 0.0})


def test_a_planted_change_is_found_in_its_language_and_no_other() -> None:
    damage = measure(PLANTED)
    assert damage["he"].delta_bpb.low < 0.08 < damage["he"].delta_bpb.high
    assert 0 < damage["he"].delta_bpb.low
    assert damage["he"].adjusted_p < 0.01
    assert damage["ar"].delta_bpb == Interval(0.0, 0.0, 0.0)
    assert damage["ar"].adjusted_p == 1.0
    assert {row.status for row in damage.values()} == {"supported"}


def test_figures_equal_a_computation_sentence_by_sentence() -> None:
    row, old, new = measure(PLANTED)["he"], BASELINE.languages["he"], PLANTED.languages["he"]
    bytes_, tokens = sum(old.bytes_), sum(old.tokens)
    delta = sum(new.nll_nats) - sum(old.nll_nats)
    assert (row.tokens, row.bytes_, row.sentences) == (tokens, bytes_, 40)
    assert row.baseline_bpb == pytest.approx(1.5, rel=1e-6)
    assert row.delta_bpb.estimate == pytest.approx(delta / math.log(2) / bytes_, rel=1e-6)
    assert row.quantized_bpb == pytest.approx(sum(new.nll_nats) / math.log(2) / bytes_, rel=1e-6)
    assert row.kl_bits_per_byte.estimate == pytest.approx(sum(new.kl_nats) / math.log(2) / bytes_, rel=1e-6)
    assert row.delta_nats_per_sentence.estimate == pytest.approx(delta / 40, rel=1e-6)
    assert row.flip_rate.estimate == pytest.approx(sum(new.flips) / tokens, rel=1e-6)
    assert row.perplexity_change_percent == pytest.approx(100 * (math.exp(delta / tokens) - 1), rel=1e-6)


def test_intervals_come_from_the_same_resample_for_every_language() -> None:
    rows, resamples = measure(PLANTED), Resamples(40, 500, seed=0)
    bytes_ = {language: np.array(BASELINE.languages[language].bytes_) for language in ("en", "he")}
    series = {
        language: resamples.ratio(
            np.array(PLANTED.languages[language].nll_nats) - np.array(BASELINE.languages[language].nll_nats),
            bytes_[language] * math.log(2),
        )
        for language in ("en", "he")
    }
    low, high = np.quantile((series["he"] - series["en"])[1:], (0.025, 0.975))
    assert known(rows["he"].excess_bpb).low == pytest.approx(low, rel=1e-5)
    assert known(rows["he"].excess_bpb).high == pytest.approx(high, rel=1e-5)


def test_excess_and_disparity_are_relative_to_the_reference() -> None:
    damage = measure(PLANTED)
    change = {language: row.delta_bpb.estimate for language, row in damage.items()}
    assert known(damage["he"].excess_bpb).estimate == pytest.approx(change["he"] - change["en"], rel=1e-5)
    assert known(damage["he"].disparity).estimate == pytest.approx(change["he"] / change["en"], rel=1e-5)
    assert known(damage["en"].excess_bpb) == Interval(0.0, 0.0, 0.0)
    assert known(damage["en"].disparity) == Interval(1.0, 1.0, 1.0)


def test_disparity_is_undefined_where_the_reference_did_not_change() -> None:
    damage = measure(changed({"en": 0.0, "he": 0.08, "ar": 0.01}))
    assert "the change of en in bits per byte is 0 [0, 0], not clearly above 0" in why(damage["he"].disparity)
    assert known(damage["he"].excess_bpb) == damage["he"].delta_bpb


def test_disparity_is_undefined_where_the_reference_improved() -> None:
    assert "not clearly above 0" in why(measure(changed({"en": -0.02, "he": 0.08, "ar": 0.01}))["he"].disparity)


def test_without_a_reference_excess_and_disparity_are_undefined() -> None:
    row = measure(PLANTED, reference=None)["he"]
    assert why(row.excess_bpb) == why(row.disparity) == "no reference language was given"


def test_a_reference_outside_the_text_set_is_an_error() -> None:
    with pytest.raises(UnknownLanguageError, match="'fr' is not in the text set; it has en, he, ar"):
        measure(PLANTED, reference="fr")


def test_an_unsupported_language_is_reported_and_left_out_of_summaries() -> None:
    baseline = make_scores("16 bit", TEXTS, BASE | {"ar": 7.0})
    bits = BASE | {"ar": 7.5}
    state = make_scores("none", TEXTS, bits, kl_bits_per_byte={"en": 0.01, "he": 0.02, "ar": 0.9})
    damage = measure_damage(baseline, state, TEXTS, vocabulary=2**20, bootstrap=Bootstrap(draws=200))
    assert [row.status for row in damage] == ["supported", "supported", "unsupported"]
    assert "no better than counting bytes" in damage[2].reason
    assert damage[2].delta_bpb.estimate == pytest.approx(0.5)
    assert supported_languages(damage) == ("en", "he")
    assert known(summarise(baseline, state, damage, bootstrap=Bootstrap(draws=200)).worst_kl).estimate == pytest.approx(
        0.02
    )
    values = objective_values(baseline, state, damage, bootstrap=Bootstrap(draws=200))
    assert known(values["worst"]).estimate == pytest.approx(0.02)


def test_a_language_that_is_no_better_than_a_byte_ngram_is_weak_and_counts() -> None:
    english, hebrew = (byte_ngram_bpb(TEXTS.sentences[name]) for name in ("en", "he"))
    baseline = make_scores("16 bit", TEXTS, {"en": english - 0.01, "he": hebrew + 0.01, "ar": 7.0})
    state = make_scores("none", TEXTS, {"en": english, "he": hebrew + 0.02, "ar": 7.5})
    damage = measure_damage(baseline, state, TEXTS, vocabulary=2**20, bootstrap=Bootstrap(draws=200))
    assert [row.fluency for row in damage] == ["fluent", "weak", "none"]
    assert damage[0].reason == ""
    assert "weak: the 16-bit model needs" in damage[1].reason
    assert supported_languages(damage) == ("en", "he")


def test_a_collapsed_language_is_reported_and_its_state_never_ranked() -> None:
    state = changed({"en": 0.02, "he": 1.0, "ar": 0.01})
    damage = tuple(measure(state).values())
    assert [row.status for row in damage] == ["supported", "collapsed", "supported"]
    assert "more than 10 times" in damage[1].reason
    summary = summarise(BASELINE, state, damage, bootstrap=Bootstrap(draws=200))
    assert known(summary.worst_kl).estimate < 0.1
    for value in objective_values(BASELINE, state, damage, bootstrap=Bootstrap(draws=200)).values():
        assert why(value) == "collapsed in he: the state is not ranked"


def test_a_collapsed_reference_leaves_excess_and_disparity_undefined() -> None:
    row = measure(changed({"en": 1.5, "he": 0.02, "ar": 0.01}))["he"]
    assert why(row.excess_bpb) == why(row.disparity) == "the reference language en is collapsed"


def test_summaries_without_a_supported_language_are_undefined() -> None:
    baseline = make_scores("16 bit", TEXTS, dict.fromkeys(BASE, 7.0))
    damage = measure_damage(baseline, baseline, TEXTS, vocabulary=2**20, bootstrap=Bootstrap(draws=200))
    summary = summarise(baseline, baseline, damage, bootstrap=Bootstrap(draws=200))
    assert "no language is supported" in why(summary.worst_kl)
    assert summary.worst_kl == summary.mean_kl == summary.mean_delta_bpb == summary.disparity
    values = objective_values(baseline, baseline, damage, bootstrap=Bootstrap(draws=200))
    assert set(values) == set(OBJECTIVES)
    assert {why(value) for value in values.values()} == {"the 16-bit model supports none of the languages"}


def naive_objective(state: StateScores, objective: str, row: Array) -> float:
    """One weighting at a time, one language at a time."""
    kl, delta = {}, {}
    for language, new in state.languages.items():
        old = BASELINE.languages[language]
        bits = math.log(2) * sum(w * b for w, b in zip(row, old.bytes_, strict=True))
        kl[language] = sum(w * k for w, k in zip(row, new.kl_nats, strict=True)) / bits
        change = [w * (b - a) for w, a, b in zip(row, old.nll_nats, new.nll_nats, strict=True)]
        delta[language] = sum(change) / bits
    others = [delta["he"], delta["ar"]]
    return {
        "worst": max(kl.values()),
        "mean": sum(kl.values()) / 3,
        "bpb": sum(delta.values()) / 3,
        "excess": max(others) - delta["en"],
        "disparity": sum(others) / 2 / delta["en"],
    }[objective]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_draws_equal_a_loop_over_resamples(objective: str) -> None:
    halves = np.stack([np.arange(40) % 2, 1 - np.arange(40) % 2]).astype(float)
    weights = np.vstack([Resamples(40, 100).weights, halves])
    found = objective_draws(BASELINE, PLANTED, TEXTS.languages, objective=objective, reference="en", weights=weights)
    assert found == pytest.approx(np.array([naive_objective(PLANTED, objective, row) for row in weights]), rel=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_values_are_the_estimate_and_percentiles_of_the_draws(objective: str) -> None:
    damage = tuple(measure(PLANTED).values())
    found = known(objective_values(BASELINE, PLANTED, damage, bootstrap=Bootstrap(draws=300, seed=4))[objective])
    weights = Resamples(40, 300, seed=4).weights
    series = objective_draws(BASELINE, PLANTED, TEXTS.languages, objective=objective, reference="en", weights=weights)
    low, high = np.quantile(series[1:], (0.025, 0.975))
    assert (found.estimate, found.low, found.high) == pytest.approx((series[0], low, high), rel=1e-3)


def test_worst_counts_the_reference_language_too() -> None:
    state = changed({"en": 0.1, "he": 0.01, "ar": 0.01}, kl={"en": 0.4, "he": 0.02, "ar": 0.02})
    damage = tuple(measure(state).values())
    assert known(objective_values(BASELINE, state, damage, bootstrap=Bootstrap())["worst"]).estimate == pytest.approx(
        0.4, rel=0.1
    )
    assert known(summarise(BASELINE, state, damage, bootstrap=Bootstrap()).worst_kl).estimate == pytest.approx(
        0.4, rel=0.1
    )


def test_hurting_only_the_reference_lowers_excess_and_disparity_but_not_worst() -> None:
    mild, harsh = changed({"en": 0.02, "he": 0.06, "ar": 0.06}), changed({"en": 0.2, "he": 0.06, "ar": 0.06})
    before, after = (
        objective_values(BASELINE, state, tuple(measure(state).values()), bootstrap=Bootstrap())
        for state in (mild, harsh)
    )
    assert known(after["excess"]).estimate < known(before["excess"]).estimate
    assert known(after["disparity"]).estimate < known(before["disparity"]).estimate
    assert known(after["worst"]).estimate > known(before["worst"]).estimate


def test_the_disparity_of_a_state_is_the_mean_of_the_others_over_the_reference() -> None:
    state = changed({"en": 0.02, "he": 0.04, "ar": 0.08})
    damage = tuple(measure(state).values())
    kl = {row.language: row.kl_bits_per_byte.estimate for row in damage}
    found = known(summarise(BASELINE, state, damage, bootstrap=Bootstrap(draws=200)).disparity)
    assert found.estimate == pytest.approx((kl["he"] + kl["ar"]) / 2 / kl["en"], rel=1e-5)
    assert found.low < found.estimate < found.high
    alone = mean_disparity({"en": np.ones(201)}, "en")
    assert why(alone) == "the reference en and another language are needed; supported: en"


def test_the_maximum_is_taken_inside_every_resample() -> None:
    # Two languages that are hurt equally on average but on different sentences: their maximum is above either.
    wave = np.sin(np.arange(40))
    kl = {"en": 0.0, "he": (0.1 + 0.09 * wave).tolist(), "ar": (0.1 - 0.09 * wave).tolist()}
    state = make_scores("none", TEXTS, BASE, kl_bits_per_byte=kl)
    weights = Resamples(40).counts
    series = {
        languages: objective_draws(BASELINE, state, languages, objective="worst", reference=None, weights=weights)
        for languages in (("he",), ("ar",), ("he", "ar"))
    }
    assert (series["he", "ar"] == np.maximum(series[("he",)], series[("ar",)])).all()
    assert series["he", "ar"].mean() > max(series[("he",)].mean(), series[("ar",)].mean())


def test_disparity_draws_are_nan_where_the_reference_lost_nothing() -> None:
    state = changed({"en": 0.0, "he": 0.08, "ar": 0.01})
    found = objective_draws(
        BASELINE, state, TEXTS.languages, objective="disparity", reference="en", weights=Resamples(40, 100).counts
    )
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("languages", "objective", "reference", "message"),
    [
        (("en", "he"), "fastest", "en", "objective 'fastest' is not known; use one of worst, mean"),
        ((), "worst", "en", "no language to rank by"),
        (("en", "he"), "excess", None, "no reference language was given"),
        (("en", "he"), "disparity", "ar", "ar is not among the supported languages"),
        (("en",), "excess", "en", "no language besides the reference en"),
    ],
)
def test_objectives_that_cannot_be_computed_are_errors(
    languages: tuple[str, ...], objective: str, reference: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_draws(
            BASELINE, PLANTED, languages, objective=objective, reference=reference, weights=Resamples(40, 100).counts
        )


def test_relative_objectives_without_a_reference_are_undefined_and_the_others_are_not() -> None:
    values = objective_values(BASELINE, PLANTED, tuple(measure(PLANTED).values()), bootstrap=Bootstrap(None, 200))
    assert {name for name, value in values.items() if isinstance(value, Undefined)} == {"excess", "disparity"}


def test_scores_of_different_sentences_are_not_compared() -> None:
    other = replace(PLANTED.languages["he"], bytes_=(1,) * 40)
    state = StateScores(state="none", languages=PLANTED.languages | {"he": other})
    with pytest.raises(ConfigError, match="scored on different sentences of he"):
        measure(state)


def test_scores_of_another_part_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="40 and 40, 39 expected"):
        measure_damage(BASELINE, PLANTED, numbered_texts(39), vocabulary=4096, bootstrap=Bootstrap())


def test_a_state_without_a_language_is_an_error() -> None:
    state = StateScores(state="none", languages={"en": PLANTED.languages["en"]})
    with pytest.raises(ConfigError, match="'none' has no scores of he"):
        measure(state)


def test_a_baseline_against_itself_is_undamaged() -> None:
    for row in measure(BASELINE).values():
        assert row.delta_bpb == row.delta_nats_per_sentence == row.kl_bits_per_byte == Interval(0.0, 0.0, 0.0)
        assert (row.adjusted_p, row.minimum_detectable_bpb, row.perplexity_change_percent) == (1.0, 0.0, 0.0)


def test_p_values_are_adjusted_over_the_languages() -> None:
    # With 500 draws and none below 0, a raw p-value is 2/501; two of three languages share it: times 3/2.
    damage = measure(PLANTED)
    assert damage["en"].adjusted_p == damage["he"].adjusted_p == pytest.approx(2 / 501 * 3 / 2, rel=1e-6)
    assert measure(PLANTED, draws=500) == damage
