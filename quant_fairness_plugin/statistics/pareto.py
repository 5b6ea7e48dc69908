"""Which evaluated plans are worth their bytes: the frontier of bytes, worst-language harm and mean harm.

Takes each plan's bytes and both harms, resample by resample (`plan_series`); returns one row per plan.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quant_fairness_plugin.artifacts import Frontier, FrontierRow, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.statistics.series import Series, check_lengths, number_of


def pareto_frontier(bytes_: Mapping[str, int], worst: Mapping[str, Series], mean: Mapping[str, Series]) -> Frontier:
    """Return the plans by bytes, each with its harms, what dominates it, and how sure its place is.

    A plan without figures (it collapsed) dominates nothing and is on no frontier. Plans with equal figures do not
    dominate each other.

    Args:
        bytes_: plan → bytes of the checkpoint, exact.
        worst: plan → `[1 + draws]`, the estimate first.
        mean: the same of the mean harm.

    Raises:
        ConfigError: the three do not name the same plans, or series of unequal length.
    """
    if not set(bytes_) == set(worst) == set(mean) or not bytes_:
        odd = sorted((set(bytes_) | set(worst) | set(mean)) - (set(bytes_) & set(worst) & set(mean)))
        raise ConfigError(f"plans {', '.join(odd) or 'missing'}: give bytes, worst and mean harm of the same plans")
    check_lengths([*worst.values(), *mean.values()])
    known = [plan for plan in bytes_ if not any(isinstance(harm[plan], Undefined) for harm in (worst, mean))]
    better = _dominating(known, bytes_, worst, mean)
    rows = [_row(plan, bytes_, worst, mean, known, better.get(plan)) for plan in bytes_]
    return Frontier(rows=tuple(sorted(rows, key=_order)))


def _dominating(
    known: list[str], bytes_: Mapping[str, int], worst: Mapping[str, Series], mean: Mapping[str, Series]
) -> dict[str, NDArray[np.bool_]]:
    """Plan → which known plans dominate it, in which draw: [known, 1 + draws]."""
    if not known:
        return {}
    sizes = np.array([bytes_[plan] for plan in known])[:, None]
    first, second = (np.stack([_values(harm[plan]) for plan in known]) for harm in (worst, mean))
    dominating: dict[str, NDArray[np.bool_]] = {}
    for i, plan in enumerate(known):
        nowhere_worse = (sizes <= sizes[i]) & (first <= first[i]) & (second <= second[i])
        dominating[plan] = nowhere_worse & ((sizes < sizes[i]) | (first < first[i]) | (second < second[i]))
    return dominating


def _row(
    plan: str,
    bytes_: Mapping[str, int],
    worst: Mapping[str, Series],
    mean: Mapping[str, Series],
    known: list[str],
    better: NDArray[np.bool_] | None,
) -> FrontierRow:
    by: tuple[str, ...] = ()
    probability = None
    if better is not None:
        names = [other for other, first in zip(known, better[:, 0], strict=True) if first]
        by = tuple(sorted(names, key=lambda other: (bytes_[other], other)))
        probability = significant(float(1.0 - better[:, 1:].any(axis=0).mean()))
    return FrontierRow(
        plan=plan,
        bytes_=bytes_[plan],
        worst=number_of(worst[plan]),
        mean=number_of(mean[plan]),
        dominated_by=by,
        on_frontier_probability=probability,
    )


def _order(row: FrontierRow) -> tuple[int, float, str]:
    return row.bytes_, float("inf") if isinstance(row.worst, Undefined) else row.worst.estimate, row.plan


def _values(series: Series) -> Array:
    assert not isinstance(series, Undefined)
    return series
