from __future__ import annotations

import math

import numpy as np
import pytest

from quant_fairness_plugin.measure import metrics


def test_bits_per_byte_of_a_uniform_byte_model_is_eight() -> None:
    assert metrics.bits_per_byte(17 * math.log(256), 17) == pytest.approx(8.0)


def test_bits_per_byte_works_on_arrays_element_by_element() -> None:
    nats, bytes_ = np.array([10.0, 20.0]), np.array([5.0, 33.0])
    expected = [metrics.bits_per_byte(10.0, 5.0), metrics.bits_per_byte(20.0, 33.0)]
    assert metrics.bits_per_byte(nats, bytes_) == pytest.approx(expected)
    assert metrics.kl_bits_per_byte(nats, bytes_) == pytest.approx(expected)


def test_perplexity_of_uniform_guessing_is_the_vocabulary() -> None:
    assert metrics.perplexity(63 * math.log(4096), 63) == pytest.approx(4096)


def test_perplexity_of_a_destroyed_model_is_finite() -> None:
    assert metrics.perplexity(5000.0, 1) == pytest.approx(math.exp(700))
    assert math.isfinite(metrics.perplexity_change_percent(5000.0, 1))


def test_perplexity_change_is_the_percent_change_of_the_two_perplexities() -> None:
    before, after, tokens = 70.0, 74.2, 17
    naive = metrics.percent_change(metrics.perplexity(before, tokens), metrics.perplexity(after, tokens))
    assert metrics.perplexity_change_percent(after - before, tokens) == pytest.approx(naive)


def test_perplexity_change_keeps_the_digits_of_a_tiny_change() -> None:
    assert metrics.perplexity_change_percent(1.234567e-12, 1) == pytest.approx(1.234567e-10, rel=1e-9)


def test_flip_rate_and_nats_per_token() -> None:
    assert metrics.flip_rate(3, 12) == 0.25
    assert metrics.nats_per_token(6.0, 12) == 0.5


@pytest.mark.parametrize(("value", "expected"), [(123.456789012, 123.4568), (0.0, 0.0), (-1.00000004e-9, -1e-9)])
def test_significant_keeps_seven_digits(value: float, expected: float) -> None:
    assert metrics.significant(value) == expected
