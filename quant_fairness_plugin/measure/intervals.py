"""Bootstrap intervals, p-values and what an experiment of this size could have seen.

Takes per-sentence numbers; returns `Interval`, `Undefined` or plain floats. Sentences are the unit of resampling, and
one `Resamples` serves every language and state, so that all comparisons are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import scipy

from quant_fairness_plugin.artifacts import Bootstrap, Interval, Number, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array, significant

MINIMUM_DRAWS = 100
SINGLE_THREAD_PRODUCTS = 1 << 18
"""OpenBLAS starts more threads above about this many multiplications."""
QUANTILES = (0.025, 0.975)
DETECTION = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
"""Standard errors that an effect must have to be detected with 80 % power at α = 0.05: 1.96 + 0.84."""


class Resamples:
    """Bootstrap resamples of sentences, as counts: how often each sentence is drawn in each resample.

    A resampled sum is then one row of a matrix product, for all languages, metrics and draws at once.
    """

    def __init__(self, sentences: int, draws: int = 2000, seed: int = 0) -> None:
        if sentences < 2:
            raise ConfigError(
                f"{sentences} sentence(s) per language: resampling needs at least 2 (and 20 to mean much). "
                "Give more sentences, or use the legacy perplexity."
            )
        if draws < MINIMUM_DRAWS:
            raise ConfigError(f"draws={draws}: a 95 % interval needs at least {MINIMUM_DRAWS}; the default is 2000.")
        self.sentences = sentences
        self.draws = draws
        self.seed = seed

    @classmethod
    def of(cls, bootstrap: Bootstrap, sentences: int) -> Resamples:
        """Return the resamples of so many sentences."""
        return cls(sentences, bootstrap.draws, bootstrap.seed)

    @property
    def counts(self) -> Array:
        """[draws, sentences]; every row sums to the number of sentences. Read-only."""
        return self.weights[1:]

    @property
    def weights(self) -> Array:
        """[1 + draws, sentences]: row 0 takes every sentence once (the estimate), the rest are `counts`. Read-only."""
        return _weights(self.sentences, self.draws, self.seed)

    def ratio(self, numerator: Array, denominator: Array) -> Array:
        """Return a ratio of sums over sentences [sentences] under every row of `weights`: [1 + draws]."""
        sums = weighted_sums(self.weights, np.stack([numerator, denominator], axis=1))
        series: Array = sums[:, 0] / sums[:, 1]
        return series


@lru_cache(maxsize=4)
def _weights(sentences: int, draws: int, seed: int) -> Array:
    """A sweep compares dozens of states under the same resamples; the array is frozen, so that sharing it is safe."""
    picked = np.random.default_rng(seed).integers(0, sentences, size=(draws, sentences))
    cells = picked + sentences * np.arange(draws)[:, None]
    counts = np.bincount(cells.ravel(), minlength=draws * sentences).reshape(draws, sentences)
    weights = np.vstack([np.ones(sentences), counts.astype(np.float64)])
    weights.flags.writeable = False
    return weights


def weighted_sums(weights: Array, values: Array) -> Array:
    """Return the product [rows, sentences] · [sentences, columns], in pieces that BLAS computes with one thread.

    Two threads on a loaded machine made one product of this size 30 times slower; and a sum that does not depend on the
    number of threads is the same everywhere.
    """
    rows = max(1, SINGLE_THREAD_PRODUCTS // values.size)
    sums = np.empty((len(weights), values.shape[1]))
    for start in range(0, len(weights), rows):
        np.matmul(weights[start : start + rows], values, out=sums[start : start + rows])
    return sums


def interval(series: Array) -> Interval:
    """Return the 95 % percentile interval of a figure: [1 + draws], the estimate first."""
    return intervals(series[:, None])[0]


def intervals(series: Array) -> tuple[Interval, ...]:
    """Return one interval per column of [1 + draws, n], the estimates in row 0.

    An interval is widened where it would leave out the estimate: resampling pushes a maximum over many languages
    upward, sometimes beyond it.
    """
    low, high = np.quantile(series[1:], QUANTILES, axis=0)
    low, high = np.minimum(low, series[0]), np.maximum(high, series[0])
    rows = zip(series[0].tolist(), low.tolist(), high.tolist(), strict=True)
    return tuple(Interval(significant(e), significant(a), significant(b)) for e, a, b in rows)


def ratio_interval(numerator: Array, denominator: Array, *, what: str) -> Number:
    """Return `ratio_intervals` of one figure: numerator and denominator are [1 + draws], the estimate first."""
    return ratio_intervals(numerator[:, None], denominator, what=what)[0]


def ratio_intervals(numerators: Array, denominator: Array, *, what: str) -> tuple[Number, ...]:
    """Return the ratio of each column to one denominator, with its interval.

    The percentiles are those of the angle of (denominator, numerator). Where both are positive that is the interval on
    a log scale (percentiles do not change under a monotone map); and the few resamples whose denominator is negative
    count as the extreme ratios that they are, instead of changing sign.

    Args:
        numerators: [1 + draws, n], the estimates in row 0.
        denominator: [1 + draws], of the same resamples.
        what: the denominator in words with its unit, for the reason of an undefined ratio.

    Returns:
        One per column; `Undefined` where the denominator's interval is not above 0.
    """
    below = interval(denominator)
    if below.low <= 0:
        reason = (
            f"{what} is {below.estimate:.3g} [{below.low:.3g}, {below.high:.3g}], not clearly above 0: "
            "a ratio to it would be noise; read the excess instead"
        )
        return tuple(Undefined(reason) for _ in numerators[0])
    lows, highs = np.quantile(np.arctan2(numerators[1:], denominator[1:, None]), QUANTILES, axis=0)
    rows = zip((numerators[0] / denominator[0]).tolist(), lows.tolist(), highs.tolist(), strict=True)
    return tuple(_from_angles(estimate, low, high, what) for estimate, low, high in rows)


def _from_angles(estimate: float, low: float, high: float, what: str) -> Number:
    if low <= -math.pi / 2 or high >= math.pi / 2:
        return Undefined(f"{what} is too close to 0 for a bounded ratio; read the excess instead")
    low, high = min(math.tan(low), estimate), max(math.tan(high), estimate)
    return Interval(significant(estimate), significant(low), significant(high))


def p_values(draws: Array) -> Array:
    """Return two-sided bootstrap p-values of `figure = 0`, one per column of draws [draws, n].

    The observed sample counts as one more draw, so that no p-value is 0; a figure that is 0 in every draw has p = 1.
    """
    total = len(draws) + 1
    below, above = (np.sum(draws <= 0, axis=0) + 1) / total, (np.sum(draws >= 0, axis=0) + 1) / total
    smaller: Array = np.minimum(below, above)
    return np.minimum(1.0, 2.0 * smaller)


def benjamini_hochberg(values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted for the false discovery rate over all of them, in the order given.

    Raises:
        ConfigError: a value outside 0..1.
    """
    if not values:
        return ()
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ConfigError(f"p-values {list(values)}: each must be between 0 and 1")
    return tuple(float(p) for p in scipy.stats.false_discovery_control(np.asarray(values), method="bh"))


def minimum_detectable(draws: Array) -> Array:
    """Return the effect that 80 % of such experiments would detect at α = 0.05, per column of draws [draws, n].

    Args:
        draws: resampled figures; their standard deviation is the standard error.
    """
    effects: Array = DETECTION * np.std(draws, axis=0, ddof=1)
    return effects
