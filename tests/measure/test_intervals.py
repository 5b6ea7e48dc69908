from __future__ import annotations

import math

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Interval, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import (
    Resamples,
    benjamini_hochberg,
    interval,
    intervals,
    minimum_detectable,
    p_values,
    ratio_interval,
    weighted_sums,
)
from quant_fairness_plugin.measure.metrics import Array


def normal_series(estimate: float, error: float, draws: int = 4000, seed: int = 0) -> Array:
    return np.concatenate([[estimate], np.random.default_rng(seed).normal(estimate, error, draws)])


@pytest.mark.parametrize("sentences", [2, 17, 33, 63])
def test_resamples_draw_as_many_sentences_as_there_are(sentences: int) -> None:
    counts = Resamples(sentences, draws=100, seed=3).counts
    assert counts.shape == (100, sentences)
    assert (counts.sum(axis=1) == sentences).all()
    assert len(np.unique(counts, axis=0)) > 1


def test_resamples_depend_on_the_seed_alone() -> None:
    assert (Resamples(17, 100, seed=1).counts == Resamples(17, 100, seed=1).counts).all()
    assert (Resamples(17, 100, seed=1).counts != Resamples(17, 100, seed=2).counts).any()


def test_shared_resamples_cannot_be_altered() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Resamples(17, 100).weights[0, 0] = 5.0


@pytest.mark.parametrize("sentences", [0, 1])
def test_one_sentence_cannot_be_resampled(sentences: int) -> None:
    with pytest.raises(ConfigError, match=f"{sentences} sentence.*at least 2"):
        Resamples(sentences)


def test_too_few_draws_are_an_error() -> None:
    with pytest.raises(ConfigError, match="draws=99.*at least 100"):
        Resamples(17, draws=99)


def test_ratio_of_sums_equals_resampling_sentence_by_sentence() -> None:
    rng = np.random.default_rng(5)
    numerator, denominator = rng.random(33), rng.random(33) + 1
    resamples = Resamples(33, draws=100, seed=7)
    picked = np.random.default_rng(7).integers(0, 33, size=(100, 33))
    naive = [numerator.sum() / denominator.sum()]
    naive += [numerator[row].sum() / denominator[row].sum() for row in picked]
    assert resamples.ratio(numerator, denominator) == pytest.approx(np.array(naive), rel=1e-12)


@pytest.mark.parametrize(("rows", "sentences", "columns"), [(1, 1, 1), (2001, 63, 84), (17, 600, 700)])
def test_weighted_sums_are_the_matrix_product(rows: int, sentences: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    weights, values = rng.random((rows, sentences)), rng.random((sentences, columns))
    assert weighted_sums(weights, values) == pytest.approx(weights @ values, rel=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, hits, trials = 0.5, 0, 400
    rng = np.random.default_rng(11)
    for trial in range(trials):
        size = rng.integers(40, 160, 40).astype(float)
        change = size * truth + rng.normal(0, 1, 40) * np.sqrt(size) * rng.exponential(1, 40)
        found = interval(Resamples(40, draws=300, seed=trial).ratio(change, size))
        hits += found.low <= truth <= found.high
    # Four standard errors of 95 % over 400 trials are 4.4 points; a percentile interval of 40 sentences runs a bit low.
    assert 0.90 <= hits / trials <= 0.985


def test_interval_is_widened_to_hold_its_own_estimate() -> None:
    series = np.concatenate([[0.0], np.linspace(1.0, 2.0, 101)])
    assert interval(series) == Interval(0.0, 0.0, pytest.approx(1.975))


def test_intervals_of_columns_equal_those_of_each_column() -> None:
    series = np.random.default_rng(0).normal(size=(301, 3))
    assert intervals(series) == tuple(interval(series[:, i]) for i in range(3))


def test_ratio_of_positive_figures_has_the_interval_of_the_log_scale() -> None:
    above, below = normal_series(0.6, 0.05), normal_series(0.3, 0.02, seed=1)
    found = ratio_interval(above, below, what="x")
    assert isinstance(found, Interval)
    low, high = np.exp(np.quantile(np.log(above[1:] / below[1:]), (0.025, 0.975)))
    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, low, high), rel=1e-3)


@pytest.mark.parametrize("estimate", [0.0, 0.01, -0.5])
def test_ratio_to_a_figure_not_above_zero_is_undefined(estimate: float) -> None:
    found = ratio_interval(normal_series(1.0, 0.1), normal_series(estimate, 0.02, seed=1), what="the change of en")
    assert isinstance(found, Undefined)
    assert found.undefined.startswith("the change of en is")
    assert "not clearly above 0" in found.undefined


def test_ratio_to_exactly_zero_is_undefined_without_a_warning() -> None:
    found = ratio_interval(normal_series(1.0, 0.1), np.zeros(4001), what="the change of en")
    assert isinstance(found, Undefined)
    assert "0 [0, 0]" in found.undefined


def test_few_negative_denominators_lengthen_the_interval_upward_only() -> None:
    below = normal_series(0.1, 0.048, draws=20_000)
    assert (below[1:] < 0).any()
    found = ratio_interval(np.full(20_001, 1.0), below, what="x")
    assert isinstance(found, Interval)
    assert 0 < found.low < 10 < found.high < math.inf
    naive_low, _ = np.quantile(1.0 / below[1:], (0.025, 0.975))
    assert naive_low < found.low


def test_ratio_without_an_upper_bound_is_undefined() -> None:
    below = np.concatenate([[1.0], [-0.9] * 3, np.full(97, 1.0)])
    assert interval(below).low > 0
    found = ratio_interval(np.full(101, 1.0), below, what="the change of en")
    assert found == Undefined("the change of en is too close to 0 for a bounded ratio; read the excess instead")


def test_p_value_counts_draws_on_the_other_side_of_zero() -> None:
    column = np.concatenate([np.full(5, -1.0), np.full(194, 1.0)])
    assert p_values(column[:, None]) == pytest.approx([2 * (5 + 1) / 200])


def test_p_value_is_never_zero_and_one_where_nothing_changed() -> None:
    assert p_values(np.stack([np.ones(199), np.zeros(199)], axis=1)) == pytest.approx([2 / 200, 1.0])


def test_benjamini_hochberg_equals_the_hand_computed_values() -> None:
    # Sorted: .01 .02 .03 .5; times 4/rank: .04 .04 .04 .5; running minimum from the right leaves them.
    assert benjamini_hochberg([0.03, 0.5, 0.01, 0.02]) == pytest.approx((0.04, 0.5, 0.04, 0.04))
    # Sorted: .01 .04 .045 .9: .04 .08 .06 .9 -> the .08 falls to .06.
    assert benjamini_hochberg([0.04, 0.9, 0.01, 0.045]) == pytest.approx((0.06, 0.9, 0.04, 0.06))
    assert benjamini_hochberg([]) == ()


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_p_value_outside_its_range_is_an_error(value: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        benjamini_hochberg([0.5, value])


def test_minimum_detectable_effect_is_found_with_eighty_percent_power() -> None:
    draws = np.random.default_rng(0).normal(0, 0.5, (4000, 1))
    effect = minimum_detectable(draws)[0]
    assert effect == pytest.approx((1.96 + 0.84) * 0.5, rel=0.03)
    observed = np.random.default_rng(1).normal(effect, 0.5, 20_000)
    assert np.mean(np.abs(observed) > 1.96 * 0.5) == pytest.approx(0.8, abs=0.03)
