"""Step 5 of 8: from a sweep to a plan, under a number of units, a byte budget or a target, with the reasons.

Takes a `SweepReport`, returns a `ProtectionPlan`. Needs no model and no torch: another budget is solved at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_fairness_plugin.artifacts import Objective, ProtectionPlan, SweepReport
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.costs import NO_OVERRIDES
from quant_fairness_plugin.recommend.allocated import Wish, plan_by_allocation
from quant_fairness_plugin.recommend.assembly import Choice, describe_overrides, explicit_plan
from quant_fairness_plugin.recommend.ranked import plan_of_prefix, plan_of_top

__all__ = ["describe_overrides", "explicit_plan", "recommend_plan"]


def recommend_plan(
    report: SweepReport,
    *,
    objective: Objective = "worst",
    top: int | None = None,
    max_overhead: float = 0.2,
    max_bytes: int | None = None,
    target: float | None = None,
    weights: Mapping[str, float] | None = None,
    strict: bool = False,
    draws: int = 2000,
    overrides: Choice = NO_OVERRIDES,
) -> ProtectionPlan:
    """The units (layers, or fusion groups where those were swept) that get more than the grid's precision.

    With `top`, exactly that many keep 16 bit, in the order of the ranking, whether or not the ranking is stable. Else
    every unit gets one of the swept precisions, by integer programming: the least damage within `max_bytes` or
    `max_overhead`, or the fewest bytes for `target`. Budgets protect nothing where the ranking is unstable.

    The plan is a prediction until it is itself evaluated on the confirm part (`predicted`).

    Args:
        report: a sweep, of layers or of units.
        objective: what to rank by; `worst` or `mean` to allocate. For the others a budget is filled from the front of
            the ranking.
        top: number of units; None = by budget or target.
        max_overhead: budget, extra bytes over the all-quantized checkpoint (0.2 = 20 %), where no other limit is given.
        max_bytes: budget for the whole checkpoint.
        target: the largest damage to accept, in bits per byte of KL.
        weights: language → importance, for all languages; 1 each where None. The ranking has none.
        strict: raise instead of returning an unstable plan, or one that misses the target.
        draws: bootstrap resamples of the stability figures.
        overrides: precisions that the user gave to layers (`layers.5`), which with all their units are then no
            candidates, and to units (`layers.3.down`), which do not count where their whole layer is chosen. They are
            paid from the budget.

    Raises:
        ConfigError: `top` is not a number of units, limits or weights that do not fit together, or the objective is
            undefined for this sweep.
        QualityGateError: the ranking is unstable or the target out of reach, and `strict` is set.
    """
    allocates = max_bytes is not None or target is not None or weights is not None
    if top is not None:
        if allocates:
            raise ConfigError(f"top {top} is a number of units by the ranking; leave out max_bytes, target and weights")
        return plan_of_top(report, top, objective=objective, strict=strict, draws=draws, overrides=overrides)
    if objective not in ("worst", "mean"):
        if allocates:
            raise ConfigError(f"objective {objective!r} cannot be added up over units; use worst or mean")
        return plan_of_prefix(
            report, max_overhead, objective=objective, strict=strict, draws=draws, overrides=overrides
        )
    wish = Wish(
        max_overhead=max_overhead if max_bytes is None and target is None else None,
        max_bytes=max_bytes,
        target=target,
        objective=objective,
        weights=weights,
        overrides=overrides,
    )
    return plan_by_allocation(report, wish, strict=strict, draws=draws)
