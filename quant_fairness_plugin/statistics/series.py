"""An objective of many plans under the same resamples of the sentences: what every comparison of plans starts from.

Step 4 (sweep). Takes per-sentence scores, returns one series per plan: the estimate first, then one value per draw.
Needs no model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from quant_fairness_plugin.artifacts import Objective, StateScores, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.damage import objective_draws
from quant_fairness_plugin.measure.intervals import Resamples, benjamini_hochberg, p_values
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
    objective: Objective,
    reference: str | None,
    collapsed: Mapping[str, Sequence[str]] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Series]:
    """The objective of each plan, all under the same resamples, so that differences between plans are paired.

    Args:
        scores: per-sentence scores of the 16-bit state and of every plan.
        plans: names of the plans to compare.
        languages: those that count; the same for all plans.
        objective: lower is better.
        reference: needed by `excess` and `disparity`.
        collapsed: plan → languages that collapsed under it; such a plan has no value.
        draws: bootstrap resamples of the sentences.
        seed: of the resamples.

    Raises:
        ConfigError: a plan without scores.
    """
    weights = Resamples(_sentences(scores), draws, seed).weights
    found: dict[str, Series] = {}
    for plan in plans:
        if plan not in scores:
            raise ConfigError(f"plan {plan!r} was not scored; there are {', '.join(scores)}")
        if lost := (collapsed or {}).get(plan):
            found[plan] = Undefined(f"{plan!r} collapsed in {', '.join(lost)}")
            continue
        values = objective_draws(
            scores[BASELINE], scores[plan], languages, objective=objective, reference=reference, weights=weights
        )
        unclear = bool(np.isnan(values).any())
        found[plan] = Undefined(f"{objective} of {plan!r} is undefined in some resamples") if unclear else values
    return found


def adjusted_p_values(series: Mapping[Key, Series]) -> dict[Key, float]:
    """Two-sided p-values of 0, Benjamini-Hochberg adjusted over the series with a value; the others are absent."""
    known = {key: value for key, value in series.items() if not isinstance(value, Undefined)}
    if not known:
        return {}
    found = p_values(np.column_stack([value[1:] for value in known.values()]))
    return {key: significant(p) for key, p in zip(known, benjamini_hochberg(found.tolist()), strict=True)}


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


def _sentences(scores: Mapping[str, StateScores]) -> int:
    if BASELINE not in scores:
        raise ConfigError(f"no scores of the {BASELINE!r} state, which damage is measured against; score it, too")
    return len(next(iter(scores[BASELINE].languages.values())).tokens)
