"""From a sweep to a plan: under a number of units, a byte budget or a target, with the reasons.

Takes a `SweepReport`, returns a `ProtectionPlan`. Needs no model and no torch: another budget is solved at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_fairness_plugin.artifacts import ProtectionPlan, SweepReport
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import additive_objectives, find_objective, one_of
from quant_fairness_plugin.plans.costs import NO_OVERRIDES
from quant_fairness_plugin.recommend.allocated import Goal, plan_by_allocation
from quant_fairness_plugin.recommend.allocation import Limit
from quant_fairness_plugin.recommend.assembly import Choice, describe_overrides, explicit_plan
from quant_fairness_plugin.recommend.ranked import Ranker, plan_of_prefix, plan_of_top

__all__ = ["DEFAULT_LIMIT", "Limit", "describe_overrides", "explicit_plan", "recommend_plan"]

DEFAULT_LIMIT = Limit(max_overhead=0.2)


def recommend_plan(
    report: SweepReport,
    limit: Limit = DEFAULT_LIMIT,
    *,
    objective: str = "worst",
    top: int | None = None,
    weights: Mapping[str, float] | None = None,
    strict: bool = False,
    draws: int = 2000,
    overrides: Choice = NO_OVERRIDES,
) -> ProtectionPlan:
    """Choose the units (layers, or fusion groups where those were swept) that get more than the grid's precision.

    With `top`, exactly that many keep 16 bit, in the order of the ranking, whether or not it is stable. Else every unit
    gets one of the swept precisions, by integer programming: the least damage within a budget, or the fewest bytes for
    a target. For objectives that do not add up over units a relative budget is filled from the front of the ranking.
    Budgets protect nothing where the ranking is unstable.

    The plan is a prediction until it is itself evaluated on the confirm part (`predicted`).

    Args:
        report: a sweep, of layers or of units.
        limit: a budget or a target; a relative budget has no effect beside `top`.
        objective: its name in `measure.objectives`.
        top: number of units; None = by the limit.
        weights: language → importance, for all languages; 1 each where None. The ranking has none.
        strict: raise instead of returning an unstable plan, or one that misses the target.
        draws: bootstrap resamples of the stability figures.
        overrides: precisions that the user gave to layers (`layers.5`), which with all their units are then no
            candidates, and to units (`layers.3.down`), which do not count where their whole layer is in the plan. They
            are paid from the budget.

    Raises:
        ConfigError: an unknown objective or one that is undefined for this sweep, `top` is not a number of units, or
            limits or weights that do not fit together.
        QualityGateError: the ranking is unstable or the target out of reach, and `strict` is set.
    """
    record = find_objective(objective)
    ranker = Ranker(report, objective, strict=strict, draws=draws)
    allocates = limit.max_bytes is not None or limit.target is not None or weights is not None
    if top is not None:
        if allocates:
            raise ConfigError(f"top {top} is a number of units by the ranking; leave out max_bytes, target and weights")
        return plan_of_top(ranker, top, overrides)
    if not record.adds_up:
        if allocates or limit.max_overhead is None:
            raise ConfigError(
                f"objective {objective!r} cannot be added up over units; use {one_of(additive_objectives())}"
            )
        return plan_of_prefix(ranker, limit.max_overhead, overrides)
    return plan_by_allocation(ranker, Goal(limit=limit, weights=weights, overrides=overrides))
