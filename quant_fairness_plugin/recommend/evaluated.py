"""Plans of a sweep that were evaluated themselves, as answers to a budget or a target. Step 5, plain data.

What is measured is worth more than what is added up from single units; where a report has a measured plan that fits
and is better, it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quant_fairness_plugin.allocation import weigh
from quant_fairness_plugin.allocation.program import Goal
from quant_fairness_plugin.artifacts import SweepReport, SweepRow
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, priced_units, row_choice
from quant_fairness_plugin.recommend.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A plan with its measured damage, on the search part."""

    plan: str
    choice: Choice
    bytes_: int
    value: float
    """The objective; lower is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPlans:
    """The plans of a sweep that protect some units, judged by one objective."""

    plans: tuple[Evaluated, ...]

    def best(self, limit: int | None, target: float | None) -> Evaluated | None:
        """The least damage within so many bytes, or the fewest bytes that reach a target; None where none does."""
        fitting = [
            plan
            for plan in self.plans
            if (limit is None or plan.bytes_ <= limit) and (target is None or plan.value <= target)
        ]
        if target is None:
            return min(fitting, key=lambda plan: (plan.value, plan.bytes_, plan.plan), default=None)
        return min(fitting, key=lambda plan: (plan.bytes_, plan.value, plan.plan), default=None)

    def error_of_prediction(
        self, options: Options, objective: Goal, weights: Mapping[str, float] | None, size: int
    ) -> float:
        """By how much the sets of `size` units turned out worse than added up; 0 where none was evaluated."""
        errors = [
            plan.value - weigh(options.predicted(plan.choice), objective, weights)
            for plan in self.plans
            if len(plan.choice) == size
        ]
        return sum(errors) / len(errors) if errors else 0.0


def evaluated_plans(report: SweepReport, objective: Goal, weights: Mapping[str, float] | None) -> EvaluatedPlans:
    """Every evaluated plan that leaves some unit quantized and in which no language collapsed."""
    return EvaluatedPlans(plans=tuple(_judged(report, objective, weights)))


def _judged(report: SweepReport, objective: Goal, weights: Mapping[str, float] | None) -> Iterator[Evaluated]:
    priced = set(priced_units(report))
    for row in report.rows:
        if row.mode != "protect-one" or not priced.issuperset(row.units) or len(row.units) == len(priced):
            continue
        damage = _damage(report, row)
        if damage is not None:
            choice = row_choice(report, row)
            yield Evaluated(
                plan=row.plan,
                choice=choice,
                bytes_=bytes_of(report, choice),
                value=weigh(damage, objective, weights),
            )


def _damage(report: SweepReport, row: SweepRow) -> dict[str, float] | None:
    """KL of each supported language; None where one collapsed."""
    if any(damage.status == "collapsed" for damage in row.damage):
        return None
    return {d.language: d.kl_bits_per_byte.estimate for d in row.damage if report.languages[d.language] == "supported"}
