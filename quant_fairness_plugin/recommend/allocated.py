"""Plans by allocation: the units' precisions under a budget or for a target, predicted or evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import (
    FINE_GROUPS,
    Mode,
    Precision,
    ProtectionPlan,
    Ranking,
    SweepReport,
    SweepRow,
    Unit,
    precision_order,
)
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE, plan_name
from quant_fairness_plugin.recommend.allocation import Allocation, Infeasible, Limit, allocate, predict_damage, weigh
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, plan_of, priced_units, row_choice
from quant_fairness_plugin.recommend.ranked import NOTHING_FREE, Ranker, candidates, too_dear, unstable

IN_CHECKPOINTS: tuple[Precision, ...] = ("fp16", "int8", FINE_GROUPS, "int4")
"""What checkpoint formats hold; all others are simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What an allocation is for, beside the objective."""

    limit: Limit
    weights: Mapping[str, float] | None = None
    """Language → importance."""
    overrides: Choice
    """What the user gave."""

    def source(self, objective: str) -> str:
        """Return the goal in words, for the plan."""
        what = f"auto by {objective}{'' if self.weights is None else ' with weights'}"
        if self.limit.max_bytes is not None:
            return f"{what} within {self.limit.max_bytes} bytes"
        if self.limit.target is not None:
            return f"{what} for at most {self.limit.target:.4g}"
        return f"{what} under {self.limit.max_overhead:.0%} extra bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """A choice and why; an empty one says why nothing is protected."""

    choice: Choice
    reason: str
    missed: bool = False
    """Whether the target is out of reach."""


def plan_by_allocation(ranker: Ranker, goal: Goal) -> ProtectionPlan:
    """Return the least predicted damage within a budget, or the fewest bytes that reach a target.

    An evaluated plan that fits and is better than the prediction is taken instead. Where the ranking is unstable, a
    budget protects nothing; a target still has its plan, with `stable` False.

    Args:
        ranker: the sweep, the objective, and whether an unstable ranking is an error.
        goal: the limit, and what counts.

    Raises:
        QualityGateError: `strict`, and the ranking is unstable or the target out of reach.
    """
    report = ranker.report
    budget = goal.limit.budget(bytes_of(report, {}))
    free = candidates(report, ranker.rank(1).units, goal.overrides)
    decision = _Decision(choice={}, reason=NOTHING_FREE)
    if free:
        options = options_of(report, goal.overrides)
        decision = _Allocator(report, ranker.objective, goal, budget, free, options).decide()
    if ranker.strict and decision.missed:
        raise QualityGateError(decision.reason)
    least = precision_order(report.grid.precision)
    raised = [unit for unit, kind in decision.choice.items() if precision_order(kind) > least]
    ranking = ranker.rank(min(max(len(raised), 1), len(report.units) - 1))
    stable = ranker.is_stable(ranking)
    if decision.choice and not stable and budget is not None and bytes_of(report, goal.overrides) <= budget:
        decision = _Decision(choice={}, reason=unstable(ranking))
    choice = {**goal.overrides, **decision.choice}
    reasons = (decision.reason, *_remarks(report, decision.choice, ranking))
    return plan_of(report, choice, source=goal.source(ranker.objective), reasons=reasons, stable=stable)


@dataclass(frozen=True, slots=True)
class _Allocator:
    """One allocation: what there is to choose from, and the limit."""

    report: SweepReport
    objective: str
    goal: Goal
    budget: int | None
    """In bytes; None where there is a target."""
    free: Sequence[str]
    """The candidates, best first; at least one."""
    options: Options

    def decide(self) -> _Decision:
        """Allocate, and compare the prediction with the plans that were evaluated."""
        predicted = self._allocate()
        choice = {} if isinstance(predicted, Infeasible) else self._raised(predicted)
        evaluated = None if self.goal.overrides or self.goal.limit.languages else self._evaluated(predicted, choice)
        if evaluated is not None:
            return evaluated
        if isinstance(predicted, Infeasible):
            return _Decision(
                choice={}, reason=self._too_dear() or predicted.reason, missed=self.goal.limit.target is not None
            )
        if not choice:
            return _Decision(choice={}, reason=self._nothing())
        return _Decision(choice=choice, reason=f"{predicted.reason}: {self._figure(predicted.value)}")

    def _allocate(self) -> Allocation | Infeasible:
        return allocate(
            self.options.bytes_,
            self.options.damage,
            Limit(max_bytes=self.budget, target=self.goal.limit.target, languages=self.goal.limit.languages),
            base=self.options.base,
            other_bytes=self.options.other_bytes,
            objective=self.objective,
            weights=self.goal.weights,
        )

    def _raised(self, predicted: Allocation) -> dict[str, Precision]:
        """What an allocation gives other than the grid's precision, in forward order; never all units 16 bit."""
        units = [unit for unit in self.report.units if unit in predicted.units]
        choice = {unit: kind for unit in units if (kind := predicted.units[unit]) != self.options.quantized}
        if len(choice) == len(priced_units(self.report)) and set(choice.values()) == {"fp16"}:
            del choice[self.free[-1]]
        return choice

    def _evaluated(self, predicted: Allocation | Infeasible, choice: Choice) -> _Decision | None:
        """The evaluated plan that is better than the prediction; None where there is none.

        Predictions are compared after a correction by how far they were off for evaluated sets of as many units.
        """
        plans = evaluated_plans(self.report, self.objective, self.goal.weights)
        best = plans.best(self.budget, self.goal.limit.target)
        if best is None:
            return None
        reason = f"{best.plan!r} was evaluated on the search part: {self._figure(best.value)}"
        if isinstance(predicted, Infeasible) or best.choice == choice:
            return _Decision(choice=best.choice, reason=f"{reason}, the best of the evaluated plans")
        error = plans.error_of_prediction(self.options, len(choice))
        expected = predicted.value + error
        if not self._is_better(best, predicted, expected):
            return None
        off = f", {expected:.4g} with the mean error of such predictions" if error else ""
        other = in_short(choice) or "nothing"
        return _Decision(
            choice=best.choice, reason=f"{reason}, better than {other}, which is predicted {predicted.value:.4g}{off}"
        )

    def _is_better(self, best: Evaluated, predicted: Allocation, expected: float) -> bool:
        target = self.goal.limit.target
        if target is None:
            return best.value <= expected
        return expected > target or best.bytes_ <= predicted.bytes_

    def _nothing(self) -> str:
        """Why an allocation leaves everything on the grid."""
        if self.budget is None:
            value = weigh(self.options.base, self.objective, self.goal.weights)
            return f"the target is reached with nothing protected: {self._figure(value)}"
        room = self.budget - bytes_of(self.report, self.goal.overrides)
        if self.options.cheapest <= room:
            return "no choice within the budget is predicted to lower the damage"
        if len(self.report.precisions) == 1 and (reason := self._too_dear()):
            return reason
        return f"the cheapest change takes {self.options.cheapest} bytes and the budget leaves {max(room, 0)}"

    def _too_dear(self) -> str | None:
        share = self.goal.limit.max_overhead
        return None if share is None else too_dear(self.report, self.free, share, self.goal.overrides)

    def _figure(self, value: float) -> str:
        return f"{self.objective} {value:.4g} bits per byte"


def _remarks(report: SweepReport, choice: Choice, ranking: Ranking) -> tuple[str, ...]:
    """How stable the ranking behind a choice is, and what of the choice no checkpoint holds."""
    if not choice:
        return ()
    quantized = report.grid.precision
    simulated = sorted({kind for kind in choice.values() if kind not in (*IN_CHECKPOINTS, quantized)})
    stability = f"{'' if ranking.stable else 'unstable ranking: '}{ranking.reason}"
    if not simulated:
        return (stability,)
    return (
        stability,
        f"{', '.join(simulated)} is simulated: no checkpoint format here holds it, and this plan cannot be exported; "
        "sweep with --precisions fp16,int8 for one that can",
    )


def in_short(choice: Choice) -> str:
    """Write a choice as `0,3:int8,5.down`: units without a precision keep 16 bit."""
    return ",".join(Unit.parse(unit).short + ("" if kind == "fp16" else f":{kind}") for unit, kind in choice.items())


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
    objective: str
    weights: Mapping[str, float] | None

    def best(self, budget: int | None, target: float | None) -> Evaluated | None:
        """Return the least damage within so many bytes, or the fewest bytes that reach a target; None if none does."""
        fitting = [
            plan
            for plan in self.plans
            if (budget is None or plan.bytes_ <= budget) and (target is None or plan.value <= target)
        ]
        if target is None:
            return min(fitting, key=lambda plan: (plan.value, plan.bytes_, plan.plan), default=None)
        return min(fitting, key=lambda plan: (plan.bytes_, plan.value, plan.plan), default=None)

    def error_of_prediction(self, options: Options, size: int) -> float:
        """Return by how much the sets of `size` units turned out worse than added up; 0 where none was evaluated."""
        errors = [
            plan.value - weigh(options.predicted(plan.choice), self.objective, self.weights)
            for plan in self.plans
            if len(plan.choice) == size
        ]
        return sum(errors) / len(errors) if errors else 0.0


def evaluated_plans(report: SweepReport, objective: str, weights: Mapping[str, float] | None) -> EvaluatedPlans:
    """Return every evaluated plan that leaves some unit quantized and in which no language collapsed."""
    priced = set(priced_units(report))
    plans = []
    for row in report.rows:
        if row.mode != "protect-one" or not priced.issuperset(row.units) or len(row.units) == len(priced):
            continue
        if (damage := _damage(report, row)) is not None:
            choice, value = row_choice(report, row), weigh(damage, objective, weights)
            plans.append(Evaluated(plan=row.plan, choice=choice, bytes_=bytes_of(report, choice), value=value))
    return EvaluatedPlans(plans=tuple(plans), objective=objective, weights=weights)


def _damage(report: SweepReport, row: SweepRow) -> dict[str, float] | None:
    """KL of each supported language; None where one collapsed."""
    if _collapsed(row):
        return None
    return {d.language: d.kl_bits_per_byte.estimate for d in row.damage if report.languages[d.language] == "supported"}


def _collapsed(row: SweepRow) -> bool:
    return any(damage.status == "collapsed" for damage in row.damage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The tables that `allocate` takes."""

    bytes_: dict[str, dict[Precision, int]]
    damage: dict[str, dict[Precision, dict[str, float]]]
    base: dict[str, float]
    other_bytes: int
    """Of everything without a choice, the units that the user gave a precision included."""
    quantized: Precision

    def predicted(self, choice: Choice) -> dict[str, float]:
        """Return the damage per language, added up from single units; those without a choice are on the grid."""
        total = dict(self.base)
        for unit, options in self.damage.items():
            for language, added in options[choice.get(unit, self.quantized)].items():
                total[language] += added
        return total

    @property
    def cheapest(self) -> int:
        """The fewest extra bytes that raise the precision of one unit."""
        dearer = (size - sizes[self.quantized] for sizes in self.bytes_.values() for size in sizes.values())
        return min((extra for extra in dearer if extra > 0), default=0)


def options_of(report: SweepReport, overrides: Choice) -> Options:
    """Return every candidate, in the precisions that it was swept at and did not collapse in.

    Under `protect-one` a choice takes from the damage of the all-quantized model, under `quantize-one` it adds to the
    16-bit model's.

    Args:
        report: the sweep.
        overrides: what the user gave; these units are no choice, and are paid for.
    """
    quantized = report.grid.precision
    mode: Mode = "protect-one" if "protect-one" in report.modes else "quantize-one"
    states = {unit: _states(report, unit, mode, quantized) for unit in candidates(report, report.units, overrides)}
    languages = [name for name, status in report.languages.items() if status == "supported"]
    over = NONE if mode == "protect-one" else BASELINE
    damage, base = predict_damage(report.scores, states, languages, over=over)
    given = bytes_of(report, overrides)
    bytes_: dict[str, dict[Precision, int]] = {}
    for name, kinds in states.items():
        unit = Unit.parse(name)
        row = "quantized" if unit.group is None else f"quantized.{unit.group}"
        on_grid = report.layer_bytes[row][unit.layer]
        # Units of the same layer that the user gave a precision keep it, and its price.
        extra = {kind: bytes_of(report, {**overrides, name: kind}) - given for kind in kinds if kind != quantized}
        bytes_[name] = {kind: on_grid + extra.get(kind, 0) for kind in kinds}
    other = given - sum(sizes[quantized] for sizes in bytes_.values())
    return Options(bytes_=bytes_, damage=damage, base=base, other_bytes=other, quantized=quantized)


def _states(report: SweepReport, unit: str, mode: Mode, quantized: Precision) -> dict[Precision, str]:
    """Precision of a unit → the state in which it alone differs from the state that damage is counted over."""
    if mode == "quantize-one":
        return {"fp16": BASELINE, quantized: plan_name(mode, [unit])}
    plans = {kind: plan_name(mode, [unit], kind) for kind in report.precisions}
    lost = {row.plan for row in report.rows if _collapsed(row)}
    return {quantized: NONE} | {kind: plan for kind, plan in plans.items() if plan not in lost}
