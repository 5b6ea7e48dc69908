"""Rates, shares and ratios of series whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quant_fairness_plugin.analysis.causes import kl_series, layer_shares, low_over_high, rate_slopes
from quant_fairness_plugin.artifacts import Interval, Undefined
from quant_fairness_plugin.measure.intervals import Resamples
from tests.planted import state


def test_a_quarter_of_the_error_a_bit_is_the_expected_slope() -> None:
    draws = np.linspace(0.9, 1.1, 50)
    rows = rate_slopes({bits: {"en": draws * 4.0**-bits} for bits in (2, 3, 4, 5, 6, 8)})
    slope = rows[0].slope
    assert isinstance(slope, Interval)
    assert slope.estimate == pytest.approx(-2 * math.log(2), rel=1e-6)
    assert slope.high - slope.low == pytest.approx(0, abs=1e-6)
    zero = rate_slopes({4: {"en": draws}, 8: {"en": 0 * draws}})[0].slope
    assert isinstance(zero, Undefined)


def test_the_shares_of_the_layers_add_up_to_one() -> None:
    draws = np.linspace(1.0, 1.2, 50)
    rows = layer_shares([{"he": 8 * draws}, {"he": 2 * draws}, {"he": 1.5 * draws}])
    shares = [row.share.estimate for row in rows if isinstance(row.share, Interval)]
    assert shares == pytest.approx([0.75, 0.0625, 0.1875])
    assert [row.removed.estimate for row in rows] == pytest.approx([6.0, 0.5, 1.5])


def test_low_resource_languages_are_compared_with_high_resource_ones() -> None:
    flat = np.ones(20)
    found = low_over_high({"en": flat, "de": 3 * flat, "he": 5 * flat, "fi": 100 * flat})
    assert isinstance(found, Interval)
    assert found.estimate == 2.5
    assert isinstance(low_over_high({"fi": flat}), Undefined)


def test_a_series_is_bits_per_byte() -> None:
    scores = state("plan", {"en": 4.0, "he": 1.0, "zh": 2.0})
    series = kl_series(scores, ["he"], Resamples(60, 200).weights)["he"]
    rows = scores.languages["he"]
    assert series[0] == pytest.approx(sum(rows.kl_nats) / sum(rows.bytes_) / math.log(2))
    assert len(series) == 201
