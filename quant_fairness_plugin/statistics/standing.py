"""Where a plan stands among controls at equal bytes, in numbers and in one sentence.

Takes the objective of plans, resample by resample (`plan_series`), all lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from quant_fairness_plugin.artifacts import Comparison, Interval, Outcome, Standing, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import interval
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.statistics.series import ALPHA, Series, adjusted_p_values, check_lengths, difference


def percentile_of(value: float, random_values: Sequence[float], *, over_sentences: Interval | None = None) -> Standing:
    """Return where a value stands among random plans, with how far so few of them can tell.

    Args:
        value: objective of the plan; lower is better.
        random_values: of the random plans; infinite for one that collapsed.
        over_sentences: the same under resampled sentences, for the record.

    Raises:
        ConfigError: no random plan, or a value that is not a number.
    """
    n = len(random_values)
    if not n or math.isnan(value) or math.isinf(value) or any(math.isnan(other) for other in random_values):
        raise ConfigError(f"value {value} among {n} random plans: give a finite value and at least one random plan")
    worse = sum(other > value for other in random_values)
    ties = sum(other == value for other in random_values)
    beaten = worse + ties / 2
    low, high = _exact_interval(worse, worse + ties, n)
    return Standing(
        percentile=significant(100 * beaten / n),
        low=significant(100 * low),
        high=significant(100 * high),
        random_plans=n,
        p_value=significant((n - worse + 1) / (n + 1)),
        over_sentences=over_sentences,
    )


def standing_of(plan: Array, random_plans: Mapping[str, Series]) -> Standing | Undefined:
    """Return `percentile_of` with the doubt about the sentences beside it.

    Args:
        plan: `[1 + draws]`, the estimate first.
        random_plans: name → the same; one without a value (it collapsed) counts as worse than any.

    Raises:
        ConfigError: series of unequal length.
    """
    if not random_plans:
        return Undefined("there is no random plan at these bytes to compare with")
    check_lengths([plan, *random_plans.values()])
    values = np.column_stack(
        [np.full(len(plan), np.inf) if isinstance(other, Undefined) else other for other in random_plans.values()]
    )
    beaten = (values > plan[:, None]) + 0.5 * (values == plan[:, None])
    percentiles: Array = 100.0 * beaten.mean(axis=1)
    return percentile_of(float(plan[0]), values[0].tolist(), over_sentences=interval(percentiles))


def compare_with(plan: Array, controls: Mapping[str, Series]) -> tuple[Comparison, ...]:
    """Compare the plan with every control, paired sentence by sentence.

    Args:
        plan: `[1 + draws]`, the estimate first.
        controls: name → the same.

    Raises:
        ConfigError: series of unequal length.
    """
    check_lengths([plan, *controls.values()])
    differences = {name: difference(other, plan) for name, other in controls.items()}
    adjusted = adjusted_p_values(differences)
    return tuple(_comparison(name, rise, adjusted.get(name)) for name, rise in differences.items())


def verdict(plan: str, standing: Standing | Undefined, comparisons: Sequence[Comparison]) -> str:
    """Say in one sentence what the plan is worth against plans that needed no search, and which it does not beat."""
    clauses = [_against_random(plan, standing)]
    groups: dict[Outcome, str] = {
        "better": "is worse than",
        "not beaten": "does NOT measurably beat",
        "beaten": "beats",
        "undefined": "cannot be compared with",
    }
    for outcome, words in groups.items():
        if names := [row.control for row in comparisons if row.outcome == outcome]:
            clauses.append(f"it {words} {', '.join(names)}")
    return "; ".join(clauses)


def _against_random(plan: str, standing: Standing | Undefined) -> str:
    if isinstance(standing, Undefined):
        return f"{plan}: {standing.undefined}"
    where = (
        f"stands at percentile {standing.percentile:.0f} [{standing.low:.0f}, {standing.high:.0f}] of "
        f"{standing.random_plans} random plans at equal bytes (p = {standing.p_value:.3f})"
    )
    beats = standing.p_value < ALPHA
    return f"{plan} {where}, {'better than chance' if beats else 'which is NOT better than chance'}"


def _comparison(name: str, rise: Series, p: float | None) -> Comparison:
    """The comparison with a control, from its objective minus the plan's."""
    if isinstance(rise, Undefined) or p is None:
        reason = rise if isinstance(rise, Undefined) else Undefined("no p-value")
        return Comparison(control=name, difference=reason, adjusted_p=None, outcome="undefined")
    number = interval(rise)
    clear = p < ALPHA and number.estimate != 0
    outcome: Outcome = "not beaten" if not clear else "beaten" if number.estimate > 0 else "better"
    return Comparison(control=name, difference=number, adjusted_p=p, outcome=outcome)


def _exact_interval(least: int, most: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a share, from the count without ties to the count with all of them."""
    low = 0.0 if least == 0 else float(scipy.stats.beta.ppf(0.025, least, n - least + 1))
    high = 1.0 if most == n else float(scipy.stats.beta.ppf(0.975, most + 1, n - most))
    return low, high
