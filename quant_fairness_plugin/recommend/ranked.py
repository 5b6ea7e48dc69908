"""Plans from the front of a ranking: a number of units, or as many as a budget pays for. Step 5, plain data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from quant_fairness_plugin.artifacts import Objective, Precision, ProtectionPlan, Ranking, SweepReport, Undefined
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, plan_of, priced_units
from quant_fairness_plugin.statistics.ranking import rank_units


def rank(report: SweepReport, objective: Objective, top: int, draws: int) -> Ranking:
    """The units of a sweep by an objective.

    Raises:
        ConfigError: it is undefined for this sweep.
    """
    ranking = rank_units(
        report.scores,
        {row.plan: row.damage for row in report.rows},
        units=report.units,
        mode="protect-one" if "protect-one" in report.modes else "quantize-one",
        objective=objective,
        reference=report.reference,
        top=top,
        draws=draws,
        seed=report.provenance.seed,
    )
    if isinstance(ranking, Undefined):
        raise ConfigError(
            f"{report.granularity}s cannot be ranked by {objective}: {ranking.undefined}; use --objective worst, mean "
            "or bpb"
        )
    return ranking


def trusted(ranking: Ranking, strict: bool) -> bool:
    """Whether a ranking is stable.

    Raises:
        QualityGateError: it is not, and `strict` is set.
    """
    if strict and not ranking.stable:
        raise QualityGateError(
            f"the ranking by {ranking.objective} is unstable: {ranking.reason}; measure more sentences"
        )
    return ranking.stable


def candidates(report: SweepReport, units: Sequence[str], overrides: Choice) -> list[str]:
    """Those of the units that can be chosen: with bytes, and not given a precision by the user, nor their layer."""
    priced = priced_units(report)
    return [u for u in units if u in priced and u not in overrides and ".".join(u.split(".")[:2]) not in overrides]


def plan_of_top(
    report: SweepReport, top: int, *, objective: Objective, strict: bool, draws: int, overrides: Choice
) -> ProtectionPlan:
    """The first `top` units of the ranking, whether or not it is stable.

    Raises:
        ConfigError: not a number of units.
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    count, what = len(priced_units(report)), "layers" if report.granularity == "layer" else "units"
    if not 1 <= top < count:
        raise ConfigError(f"top {top} is not a number of {what}; the sweep has {count}, use 1..{count - 1}")
    ranking = rank(report, objective, top, draws)
    stable = trusted(ranking, strict)
    free = candidates(report, ranking.units, overrides)
    if top > len(free):
        raise ConfigError(
            f"top {top} asks for more {what} than the {len(free)} without a precision of their own; ask for "
            "fewer, or leave int8_layers out"
        )
    reasons = (f"asked for {top} {what}; {ranking.reason}",)
    return plan_of(
        report,
        protecting(free[:top], overrides),
        source=f"top {top} by {objective}",
        reasons=reasons,
        stable=stable,
    )


def plan_of_prefix(
    report: SweepReport, max_overhead: float, *, objective: Objective, strict: bool, draws: int, overrides: Choice
) -> ProtectionPlan:
    """As many units from the front of the ranking as the budget pays for; none where the ranking is unstable.

    Raises:
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    free = candidates(report, rank(report, objective, 1, draws).units, overrides)
    affordable = _affordable(report, free, max_overhead, overrides)
    ranking = rank(report, objective, max(affordable, 1), draws)
    stable, chosen, reason = trusted(ranking, strict), free[:affordable], ranking.reason
    if not affordable:
        reason = too_dear(report, free, max_overhead, overrides)
    elif not stable:
        chosen, reason = [], unstable(ranking)
    source = f"auto by {objective} under {max_overhead:.0%} extra bytes"
    return plan_of(report, protecting(chosen, overrides), source=source, reasons=(reason,), stable=stable)


def protecting(units: Sequence[str], overrides: Choice) -> dict[str, Precision]:
    """The choice that keeps units in 16 bit besides what the user gave."""
    return {**overrides, **dict.fromkeys(units, "fp16")}


def unstable(ranking: Ranking) -> str:
    """Why nothing is protected."""
    return f"unstable ranking, so nothing is protected: {ranking.reason}"


def too_dear(report: SweepReport, free: Sequence[str], max_overhead: float, overrides: Choice) -> str:
    """Why nothing fits the budget.

    Args:
        report: the sweep.
        free: what can be chosen, best first.
        max_overhead: the budget.
        overrides: what the user gave.
    """
    if not free:
        return "every unit has a precision of its own already"
    floor = bytes_of(report, {})
    extra = bytes_of(report, protecting(free[:1], overrides)) - floor
    what = "one layer" if report.granularity == "layer" else "one unit"
    return (
        f"{what} costs more than the budget of {max_overhead:.2%}: the first of the ranking, "
        f"{free[0].removeprefix('layers.')}, takes {extra / floor:.2%}"
        f"{' with the precisions that were given' if overrides else ''}"
    )


def _affordable(report: SweepReport, free: Sequence[str], max_overhead: float, overrides: Choice) -> int:
    """How many of the candidates, from the front, fit the budget; never all units of the model."""
    floor = bytes_of(report, {})
    longest = min(len(free), len(priced_units(report)) - 1)
    costs = (bytes_of(report, protecting(free[: n + 1], overrides)) - floor for n in range(longest))
    return sum(takewhile(bool, (cost <= max_overhead * floor for cost in costs)))
