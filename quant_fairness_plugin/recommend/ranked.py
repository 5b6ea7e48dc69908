"""Plans from the front of a ranking: a number of units, or as many as a budget pays for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Precision,
    ProtectionPlan,
    Ranking,
    SweepReport,
    Undefined,
    Unit,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.measure.objectives import OBJECTIVES, one_of
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, plan_of, priced_units
from quant_fairness_plugin.statistics.ranking import rank_units


@dataclass(frozen=True, slots=True)
class Ranker:
    """The units of a sweep by one objective, and what to do where their order is unstable."""

    report: SweepReport
    objective: str
    strict: bool
    """An unstable ranking is an error."""
    draws: int

    def rank(self, top: int) -> Ranking:
        """Return the ranking, with the stability of its first `top` units.

        Raises:
            ConfigError: the objective is undefined for this sweep.
        """
        report = self.report
        ranking = rank_units(
            report.scores,
            {row.plan: row.damage for row in report.rows},
            units=report.units,
            mode="protect-one" if "protect-one" in report.modes else "quantize-one",
            objective=self.objective,
            top=top,
            bootstrap=Bootstrap(report.reference, self.draws, report.provenance.seed),
        )
        if isinstance(ranking, Undefined):
            others = [name for name, record in OBJECTIVES.items() if not record.needs_reference]
            raise ConfigError(
                f"{report.granularity}s cannot be ranked by {self.objective}: {ranking.undefined}; use --objective "
                f"{one_of(others)}"
            )
        return ranking

    def is_stable(self, ranking: Ranking) -> bool:
        """Return whether a ranking is stable.

        Raises:
            QualityGateError: it is not, and `strict` is set.
        """
        if self.strict and not ranking.stable:
            raise QualityGateError(
                f"the ranking by {ranking.objective} is unstable: {ranking.reason}; measure more sentences"
            )
        return ranking.stable


def candidates(report: SweepReport, units: Sequence[str], overrides: Choice) -> list[str]:
    """Return those of the units with known bytes that have no precision from the user, nor has their layer."""
    priced = priced_units(report)
    return [u for u in units if u in priced and u not in overrides and str(Unit.parse(u).whole) not in overrides]


def plan_of_top(ranker: Ranker, top: int, overrides: Choice) -> ProtectionPlan:
    """Return the plan of the first `top` units of the ranking, whether or not it is stable.

    Raises:
        ConfigError: not a number of units.
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    report = ranker.report
    count, what = len(priced_units(report)), "layers" if report.granularity == "layer" else "units"
    if not 1 <= top < count:
        raise ConfigError(f"top {top} is not a number of {what}; the sweep has {count}, use 1..{count - 1}")
    ranking = ranker.rank(top)
    stable = ranker.is_stable(ranking)
    free = candidates(report, ranking.units, overrides)
    if top > len(free):
        raise ConfigError(
            f"top {top} asks for more {what} than the {len(free)} without a precision from the user; ask for "
            "fewer, or leave int8_layers out"
        )
    reasons = (f"{top} {what} as requested; {ranking.reason}",)
    choice = protecting(free[:top], overrides)
    return plan_of(report, choice, source=f"top {top} by {ranker.objective}", reasons=reasons, stable=stable)


def plan_of_prefix(ranker: Ranker, max_overhead: float, overrides: Choice) -> ProtectionPlan:
    """Return the plan of as many units from the front of the ranking as the budget pays for.

    None are protected where the ranking is unstable.

    Raises:
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    report = ranker.report
    free = candidates(report, ranker.rank(1).units, overrides)
    affordable = _affordable(report, free, max_overhead, overrides)
    ranking = ranker.rank(max(affordable, 1))
    stable, units, reason = ranker.is_stable(ranking), free[:affordable], ranking.reason
    if not affordable:
        reason = too_dear(report, free, max_overhead, overrides)
    elif not stable:
        units, reason = [], unstable(ranking)
    source = f"auto by {ranker.objective} under {max_overhead:.0%} extra bytes"
    return plan_of(report, protecting(units, overrides), source=source, reasons=(reason,), stable=stable)


def protecting(units: Sequence[str], overrides: Choice) -> dict[str, Precision]:
    """Return the choice that keeps units in 16 bit, together with what the user gave."""
    return {**overrides, **dict.fromkeys(units, "fp16")}


def unstable(ranking: Ranking) -> str:
    """Say why nothing is protected."""
    return f"unstable ranking, so nothing is protected: {ranking.reason}"


NOTHING_FREE = "every unit has a precision from the user already"


def too_dear(report: SweepReport, free: Sequence[str], max_overhead: float, overrides: Choice) -> str:
    """Say why nothing fits the budget.

    Args:
        report: the sweep.
        free: the candidates, best first.
        max_overhead: the budget.
        overrides: what the user gave.
    """
    if not free:
        return NOTHING_FREE
    floor = bytes_of(report, {})
    extra = bytes_of(report, protecting(free[:1], overrides)) - floor
    what = "one layer" if report.granularity == "layer" else "one unit"
    return (
        f"{what} costs more than the budget of {max_overhead:.2%}: the first of the ranking, "
        f"{Unit.parse(free[0]).short}, takes {extra / floor:.2%}"
        f"{' with the precisions that were given' if overrides else ''}"
    )


def _affordable(report: SweepReport, free: Sequence[str], max_overhead: float, overrides: Choice) -> int:
    """How many of the candidates, from the front, fit the budget; never all units of the model."""
    floor = bytes_of(report, {})
    longest = min(len(free), len(priced_units(report)) - 1)
    costs = (bytes_of(report, protecting(free[: n + 1], overrides)) - floor for n in range(longest))
    return sum(takewhile(bool, (cost <= max_overhead * floor for cost in costs)))
