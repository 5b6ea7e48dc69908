"""Rank correlations of a few items, with all that so few can tell: intervals, permutations, what would be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import kendalltau, norm, rankdata

from quant_fairness_plugin.artifacts import Interval, Number, Undefined
from quant_fairness_plugin.measure.intervals import DETECTION
from quant_fairness_plugin.measure.metrics import Array, significant

FEWEST = 4
"""Fisher's interval divides by the root of n - 3."""
PERMUTATIONS = 10_000


def correlations(score: Array, rows: Array) -> Array:
    """Return Pearson's correlation of a score `[items]` with each row `[rows, items]`."""
    first, second = score - score.mean(), rows - rows.mean(axis=1, keepdims=True)
    values: Array = second @ first / np.sqrt((first**2).sum() * (second**2).sum(axis=1))
    return values


def kendall(first: Array, second: Array) -> Array:
    """Return Kendall's τ-b, `[rows]`, of two times `[rows, items]`, row by row; NaN where one of the two is flat."""
    one, two = np.triu_indices(first.shape[1], 1)
    ups, others = (np.sign(side[:, one] - side[:, two]).astype(np.int8) for side in (first, second))
    agreeing = (ups * others).sum(axis=1)
    untied = np.abs(ups).sum(axis=1) * np.abs(others).sum(axis=1)
    taus: Array = np.divide(agreeing, np.sqrt(untied), out=np.full(len(first), np.nan), where=untied > 0)
    return taus


def kendall_p(first: Array, second: Array) -> float | Undefined:
    """Return the exact share of all orders of the items under which τ is as high; undefined where values tie.

    Args:
        first: one value per item, `[items]`.
        second: the same of the other side.
    """
    if len(set(first.tolist())) < len(first) or len(set(second.tolist())) < len(second):
        return Undefined("values tie, and the exact p-value is of orders without ties")
    return significant(float(kendalltau(first, second, alternative="greater", method="exact").pvalue))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | Undefined:
    """Return Spearman's correlation; undefined where one side does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return Undefined("one of the two does not vary")
    return float(correlations(rankdata(first), rankdata(second)[None])[0])


def over_items(rho: float, items: int) -> Number:
    """Return Fisher's 95 % interval of a rank correlation, with the factor of Spearman's variance (Bonett 2000)."""
    if items < FEWEST:
        return Undefined(f"{items} items: an interval over them needs at least {FEWEST}")
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))  # a perfect order has no finite transform
    reach = float(norm.ppf(0.975)) * math.sqrt((1 + rho**2 / 2) / (items - 3))
    low, high = math.tanh(centre - reach), math.tanh(centre + reach)
    return Interval(significant(rho), significant(min(low, rho)), significant(max(high, rho)))


def permutation_p(first: Sequence[float], second: Sequence[float], *, seed: int) -> float:
    """Return the two-sided p-value of no association: how many of 10,000 shuffles are as far from 0."""
    ranks, other = rankdata(first), rankdata(second)
    draw = np.random.default_rng(seed)
    shuffled = np.array([draw.permutation(other) for _ in range(PERMUTATIONS)])
    observed = abs(correlations(ranks, other[None])[0])
    # Sums of ranks are exact, their correlations are not: a tie must count as one.
    extreme = int((np.abs(correlations(ranks, shuffled)) >= observed - 1e-12).sum())
    return significant((extreme + 1) / (PERMUTATIONS + 1))


def partial(first: Sequence[float], second: Sequence[float], given: Sequence[float]) -> float | Undefined:
    """Return the rank correlation of two figures with a third one held fixed."""
    direct, one, two = spearman(first, second), spearman(first, given), spearman(second, given)
    if isinstance(direct, Undefined) or isinstance(one, Undefined) or isinstance(two, Undefined):
        return Undefined("one of the three does not vary")
    rest = (1 - one**2) * (1 - two**2)
    return (direct - one * two) / math.sqrt(rest) if rest > 1e-12 else Undefined("the third one says all of another")


def detectable_rho(items: int) -> float | Undefined:
    """Return the correlation that so many items would show with 80 % power at α = 0.05."""
    if items < FEWEST:
        return Undefined(f"{items} items are too few")
    return significant(math.tanh(DETECTION * math.sqrt(1.06 / (items - 3))))
