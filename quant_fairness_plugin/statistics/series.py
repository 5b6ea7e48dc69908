"""An objective of many plans under the same resamples of the sentences: what every comparison of plans starts from.

Takes per-sentence scores; returns one series per plan: the estimate first, then one value per draw.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from quant_fairness_plugin.artifacts import Bootstrap, Number, StateScores, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.damage import count_sentences, objective_draws
from quant_fairness_plugin.measure.intervals import Resamples, benjamini_hochberg, interval, p_values
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.plans.plan_set import BASELINE

ALPHA = 0.05
"""Of the adjusted p-values below which a difference is called one."""
Key = TypeVar("Key", bound=Hashable)
Series = Array | Undefined
"""`[1 + draws]`, or the reason why a plan has no value."""


def plan_series(
    scores: Mapping[str, StateScores],
    plans: Iterable[str],
    languages: Sequence[str],
    *,
    objective: str,
    bootstrap: Bootstrap,
    collapsed: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Series]:
    """Return the objective of each plan, all under the same resamples, so that differences between plans are paired.

    Args:
        scores: per-sentence scores of the 16-bit state and of every plan.
        plans: names of the plans to compare.
        languages: those that count; the same for all plans.
        objective: lower is better.
        bootstrap: resamples of the sentences, and the reference of objectives that need one.
        collapsed: plan → languages that collapsed under it; such a plan has no value.

    Raises:
        ConfigError: a plan without scores.
    """
    if BASELINE not in scores:
        raise ConfigError(f"no scores of the {BASELINE!r} state, which damage is measured against; score it, too")
    baseline = scores[BASELINE]
    weights = Resamples.of(bootstrap, count_sentences(baseline)).weights

    def series(plan: str) -> Series:
        if plan not in scores:
            raise ConfigError(f"plan {plan!r} was not scored; there are {', '.join(scores)}")
        if lost := (collapsed or {}).get(plan):
            return Undefined(f"{plan!r} collapsed in {', '.join(lost)}")
        values = objective_draws(
            baseline, scores[plan], languages, objective=objective, reference=bootstrap.reference, weights=weights
        )
        unclear = bool(np.isnan(values).any())
        return Undefined(f"{objective} of {plan!r} is undefined in some resamples") if unclear else values

    return {plan: series(plan) for plan in plans}


def number_of(series: Series) -> Number:
    """Return the estimate with its interval, or the reason why there is none."""
    return series if isinstance(series, Undefined) else interval(series)


def difference(first: Series, second: Series) -> Series:
    """Return the first minus the second, resample by resample; undefined where one of them is."""
    if isinstance(first, Undefined):
        return first
    if isinstance(second, Undefined):
        return second
    values: Array = first - second
    return values


def adjusted_p_values(series: Mapping[Key, Series]) -> dict[Key, float]:
    """Return two-sided p-values of 0, Benjamini-Hochberg adjusted over the series with a value, for these only."""
    known = {key: value for key, value in series.items() if not isinstance(value, Undefined)}
    if not known:
        return {}
    raw = p_values(np.column_stack([value[1:] for value in known.values()]))
    return {key: significant(p) for key, p in zip(known, benjamini_hochberg(raw.tolist()), strict=True)}


def check_lengths(series: Sequence[Series]) -> None:
    """Refuse series that cannot be of the same resamples.

    Raises:
        ConfigError: unequal lengths, or no draws.
    """
    lengths = sorted({len(value) for value in series if not isinstance(value, Undefined)})
    if len(lengths) > 1 or (lengths and lengths[0] < 2):
        raise ConfigError(
            f"series of {', '.join(map(str, lengths))} values: give every plan the same resamples, the estimate first"
        )
