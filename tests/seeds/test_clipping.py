from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.clipping.theory import optimal_alpha, quantization_error
from quant_fairness_plugin.seeds import clipping
from quant_fairness_plugin.seeds.clipping import Component

RANDOM = np.random.default_rng(0)
GAUSSIAN = RANDOM.standard_normal(400_000)


def test_the_seeds_threshold_of_three_and_a_half_is_their_error_term() -> None:
    assert clipping.legacy_optimal_alpha(4) == pytest.approx(3.54, abs=0.005)
    assert clipping.legacy_adjusted_alpha(2.0) == pytest.approx(4.24, abs=0.005)
    assert clipping.legacy_adjusted_alpha(-1.0) == clipping.legacy_optimal_alpha(4)
    right = clipping._minimise(lambda z: clipping.gaussian_clip_error(z) + (2 * z / 15) ** 2 / 12, 0.5, 6.0)
    assert right == pytest.approx(2.52, abs=0.005)  # nothing changed but the term
    assert optimal_alpha(4, "gaussian") == pytest.approx(2.54, abs=0.005)


@pytest.mark.parametrize("z", [0.0, 0.5, 1.5, 3.0])
def test_the_overload_of_a_gaussian_is_its_integral_and_the_seeds_is_not(z: float) -> None:
    def overload(x: float) -> float:
        return float(2 * (x - z) ** 2 * stats.norm.pdf(x))

    true = integrate.quad(overload, z, np.inf)[0]
    assert clipping.gaussian_clip_error(z) == pytest.approx(true, rel=1e-8)
    assert abs(clipping.legacy_gaussian_clip_error(z) - true) > 0.2 * true


def test_the_seeds_overload_is_28_times_too_large_at_the_usual_threshold() -> None:
    ratio = clipping.legacy_gaussian_clip_error(2.5) / clipping.gaussian_clip_error(2.5)
    assert ratio == pytest.approx(27.6, abs=0.1)
    assert clipping.legacy_gaussian_clip_error(0.5) > clipping.legacy_gaussian_clip_error(0.0)


@pytest.mark.parametrize(
    ("bits", "excess", "variant", "alpha"),
    [
        (4, 0.0, "library", 2.5),
        (4, 3.0, "library", 2.9159),
        (4, 6.0, "library", 3.0838),
        (3, -1.0, "library", 2.0),
        (8, 0.0, "library", 4.0),
        (8, 0.0, "corpus", 1.5),
        (8, math.e - 1, "intervention", 4.5),
        (3, math.e - 1, "intervention", 2.25),
        (5, 0.0, "library", 2.5),
    ],
)
def test_the_seeds_logarithmic_rule(bits: int, excess: float, variant: Any, alpha: float) -> None:
    assert clipping.legacy_log_alpha(2.0, excess, bits, variant=variant) == pytest.approx(2 * alpha, abs=1e-3)


def test_the_logarithmic_rule_is_short_of_the_optimum_for_heavy_tails() -> None:
    laplace = optimal_alpha(4, "laplace") / math.sqrt(2)
    assert laplace == pytest.approx(3.51, abs=0.005)
    assert clipping.legacy_log_alpha(1.0, 3.0) < laplace - 0.5
    assert clipping.kurtosis_adjusted_alpha(1.0, 6.0, 4) == pytest.approx(3.68, abs=0.005)
    assert clipping.legacy_log_alpha(1.0, 6.0) < 3.68 - 0.5


@pytest.mark.parametrize(("kurtosis", "alpha"), [(3.9, 2.5), (4.0, 3.0), (7.9, 3.0), (8.0, 3.5), (18.0, 4.5)])
def test_the_seeds_steps(kurtosis: float, alpha: float) -> None:
    assert clipping.legacy_step_alpha(2.0, kurtosis) == pytest.approx(2 * alpha)


def test_the_seeds_constant_is_the_papers_for_laplace_at_two_bits() -> None:
    assert clipping.legacy_constant_alpha(2.0) == pytest.approx(5.66)
    assert clipping.aciq_alpha(2, "laplace") == pytest.approx(2.83, abs=0.005)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_seeds_quantizer_has_a_level_too_many_and_overshoots(bits: int) -> None:
    rounded = clipping.legacy_quantize(GAUSSIAN, 1.5, bits)
    assert len(np.unique(rounded)) == 2**bits + 1
    assert np.abs(rounded).max() == pytest.approx(1.5 * 2**bits / (2**bits - 1))


def test_the_seeds_decomposition_is_not_the_error_of_their_quantizer() -> None:
    claimed = clipping.legacy_error(GAUSSIAN, 1.5, 4)
    actual = float(((clipping.legacy_quantize(GAUSSIAN, 1.5, 4) - GAUSSIAN) ** 2).mean())
    assert claimed == pytest.approx(0.0489, abs=2e-4)
    assert actual == pytest.approx(0.0385, abs=2e-4)


def test_the_seeds_bounds_and_bit_rule() -> None:
    assert clipping.legacy_disparity_bound([0.0, 2.0], 4) == pytest.approx(0.25)
    assert clipping.legacy_disparity_bound([0.0, 2.0], 4, exponent=1) == pytest.approx(0.0625)
    assert [clipping.legacy_layer_bits(kurtosis, 1.5) for kurtosis in (1.5, 1.6)] == [4, 8]
    assert [clipping.kurtosis_regime(kurtosis) for kurtosis in (0.3, 1.2, 1.5)] == ["low", "middle", "high"]


def test_a_bit_more_quarters_the_error_where_nothing_is_clipped() -> None:
    errors = [quantization_error(40.0, bits, "gaussian").total for bits in (7, 8)]
    slope = math.log(errors[1] / errors[0])
    assert slope == pytest.approx(clipping.RATE_SLOPE, rel=0.01)
    assert pytest.approx(4 * clipping.LEGACY_RATE_SLOPE) == clipping.RATE_SLOPE


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ("gaussian", [1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92]),
        ("laplace", [2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89]),
    ],
)
def test_the_papers_thresholds_and_how_far_the_exact_ones_are_from_them(shape: Any, published: list[float]) -> None:
    for bits, alpha in zip(range(2, 9), published, strict=True):
        assert clipping.aciq_alpha(bits, shape) == pytest.approx(alpha, abs=0.011)
        exact = optimal_alpha(bits, shape, symmetric=False)
        assert exact < alpha + 0.01
        assert exact == pytest.approx(alpha, rel=0.03 if bits >= 4 else 0.19)


def sampled(parts: list[tuple[float, np.ndarray[Any, Any]]]) -> tuple[list[Component], np.ndarray[Any, Any]]:
    """Components with the moments of samples, and the samples in those shares."""
    components = [
        Component(
            weight=share,
            mean=float(values.mean()),
            variance=float(values.var()),
            excess=float(stats.kurtosis(values)),
            skewness=float(stats.skew(values)),
        )
        for share, values in parts
    ]
    count = min(int(len(values) / share) for share, values in parts)
    return components, np.concatenate([values[: round(share * count)] for share, values in parts])


def test_the_kurtosis_of_a_mixture_is_that_of_the_pooled_values() -> None:
    lopsided = RANDOM.exponential(size=30_000)
    parts, pooled = sampled([(0.25, lopsided[:10_000] + 2), (0.75, RANDOM.standard_normal(30_000) * 2)])
    assert clipping.mixture_variance(parts) == pytest.approx(float(pooled.var()), rel=1e-6)
    expected = float(stats.kurtosis(pooled))
    assert clipping.effective_kurtosis(parts) == pytest.approx(expected, rel=1e-6)
    without = [Component(part.weight, part.mean, part.variance, part.excess) for part in parts]
    assert abs(clipping.effective_kurtosis(without) - expected) > 0.05  # the seeds' formula


def test_the_language_aware_threshold_is_that_of_the_mixture() -> None:
    parts = [Component(0.5, 0.0, 1.0, 0.0), Component(0.5, 0.0, 4.0, 0.0)]
    sigma, excess = math.sqrt(2.5), 3 * (0.5 * 1 + 0.5 * 16) / 2.5**2 - 3
    assert clipping.laaciq_alpha(parts, 4) == pytest.approx(clipping.kurtosis_adjusted_alpha(sigma, excess, 4))
    assert clipping.laaciq_alpha(parts, 4, legacy=True) == pytest.approx(sigma * (2.5 + 0.3 * math.log(1 + excess)))


def test_one_threshold_for_all_languages_serves_the_worst_best_when_it_is_chosen_for_it() -> None:
    samples = {"en": GAUSSIAN[:20_000], "he": 1.7 * RANDOM.standard_t(5, 20_000)}
    found = clipping.compare_languages(samples, 4)
    assert found.worst_minimax < found.worst_global
    for language, values in samples.items():
        own = found.languages[language]
        tries = np.linspace(0.3, 4, 300) * own.best_alpha
        best = min(clipping.integer_grid_error(values, alpha, 4) for alpha in tries) / values.var()
        assert own.best_error <= best * (1 + 1e-3)
        assert own.best_error <= min(own.global_error, own.minimax_error)
    alphas = np.linspace(found.languages["en"].best_alpha, found.languages["he"].best_alpha, 300)
    worst = min(
        max(clipping.integer_grid_error(values, alpha, 4) / values.var() for values in samples.values())
        for alpha in alphas
    )
    assert found.worst_minimax <= worst * (1 + 1e-3)
    assert (found.languages["en"].regime, found.languages["he"].regime) == ("low", "high")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipping.compare_languages({}, 4), "no language: values without spread"),
        (lambda: clipping.compare_languages({"en": np.ones(9)}, 4), "en: values without spread have no threshold"),
        (lambda: clipping.compare_languages({"en": GAUSSIAN[:9]}, 1), "bits 1 is not an integer from 2 to 8"),
        (lambda: clipping.mixture_variance([Component(0.5, 0, 1, 0)]), "shares of the 1 parts add up to 0.5"),
        (lambda: clipping.effective_kurtosis([Component(1.0, 0, 0, 0)]), "variance is 0, so its kurtosis is undefined"),
        (lambda: clipping.kurtosis_adjusted_alpha(1.0, math.nan, 4), "kurtosis nan is undefined"),
        (lambda: clipping.aciq_alpha(9, "gaussian"), "bits 9 is not an integer"),
    ],
)
def test_what_has_no_answer_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
