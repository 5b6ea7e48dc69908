"""Plans by allocation: the units' precisions under a budget or for a target, predicted or evaluated. Plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import (
    Mode,
    Precision,
    ProtectionPlan,
    Ranking,
    SweepReport,
    SweepRow,
    bits_of_precision,
    precision_of_bits,
)
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE, plan_name
from quant_fairness_plugin.recommend.allocation import (
    Allocation,
    Infeasible,
    allocate,
    byte_limit,
    predict_damage,
    weigh,
)
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, plan_of, priced_units, row_choice
from quant_fairness_plugin.recommend.milp import Goal
from quant_fairness_plugin.recommend.ranked import candidates, rank, too_dear, trusted, unstable

IN_CHECKPOINTS: tuple[Precision, ...] = ("fp16", "int8", "int4")
"""What checkpoint formats hold; all others are simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an allocation is for: one limit, and what counts."""

    max_overhead: float | None = None
    max_bytes: int | None = None
    target: float | None = None
    objective: Goal = "worst"
    weights: Mapping[str, float] | None = None
    overrides: Choice

    def source(self) -> str:
        """The wish in words, for the plan."""
        what = f"auto by {self.objective}{'' if self.weights is None else ' with weights'}"
        if self.max_bytes is not None:
            return f"{what} within {self.max_bytes} bytes"
        if self.target is not None:
            return f"{what} for at most {self.target:.4g}"
        return f"{what} under {self.max_overhead:.0%} extra bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A choice and why; an empty one says why nothing is chosen."""

    choice: Choice
    reason: str
    missed: bool = False
    """Whether the target is out of reach."""


def plan_by_allocation(report: SweepReport, wish: Wish, *, strict: bool, draws: int) -> ProtectionPlan:
    """The least predicted damage within a budget, or the fewest bytes that reach a target.

    An evaluated plan that fits and is better than the prediction is taken instead. Where the ranking is unstable, a
    budget protects nothing; a target is still answered, with `stable` False.

    Raises:
        QualityGateError: `strict`, and the ranking is unstable or the target out of reach.
    """
    limit = byte_limit(wish.max_bytes, wish.max_overhead, wish.target, bytes_of(report, {}))
    order = rank(report, wish.objective, 1, draws).units
    answer = _answer(report, wish, limit, order)
    if strict and answer.missed:
        raise QualityGateError(answer.reason)
    raised = [unit for unit, kind in answer.choice.items() if bits_of_precision(kind) > report.grid.bits]
    ranking = rank(report, wish.objective, min(max(len(raised), 1), len(report.units) - 1), draws)
    stable = trusted(ranking, strict)
    if answer.choice and not stable and limit is not None and bytes_of(report, wish.overrides) <= limit:
        answer = _Answer(choice={}, reason=unstable(ranking))
    choice = {**wish.overrides, **answer.choice}
    reasons = (answer.reason, *_remarks(report, answer.choice, ranking))
    return plan_of(report, choice, source=wish.source(), reasons=reasons, stable=stable)


def _answer(report: SweepReport, wish: Wish, limit: int | None, order: tuple[str, ...]) -> _Answer:
    free = candidates(report, order, wish.overrides)
    if not free:
        return _Answer(choice={}, reason="every unit has a precision of its own already")
    options = options_of(report, wish.overrides)
    found = allocate(
        options.bytes_,
        options.damage,
        base=options.base,
        other_bytes=options.other_bytes,
        max_bytes=limit,
        target=wish.target,
        objective=wish.objective,
        weights=wish.weights,
    )
    choice = {} if isinstance(found, Infeasible) else _raised(report, options, found, free)
    evaluated = None if wish.overrides else _evaluated(report, wish, limit, options, found, choice)
    if evaluated is not None:
        return evaluated
    if isinstance(found, Infeasible):
        told = too_dear(report, free, wish.max_overhead, wish.overrides) if wish.max_overhead is not None else None
        return _Answer(choice={}, reason=told or found.reason, missed=wish.target is not None)
    if not choice:
        return _Answer(choice={}, reason=_nothing(report, wish, limit, options, free))
    return _Answer(choice=choice, reason=f"{found.reason}: {_said(wish, found.value)}")


def _raised(report: SweepReport, options: Options, found: Allocation, free: list[str]) -> dict[str, Precision]:
    """What an allocation gives other than the grid's own precision, in forward order; never all units 16 bit.

    Args:
        report: the sweep.
        options: what there was to choose from.
        found: the allocation.
        free: the units that could be chosen, best first.
    """
    choice = {u: found.units[u] for u in report.units if u in found.units and found.units[u] != options.quantized}
    if len(choice) == len(priced_units(report)) and set(choice.values()) == {"fp16"}:
        del choice[free[-1]]
    return choice


def _evaluated(
    report: SweepReport, wish: Wish, limit: int | None, options: Options, found: Allocation | Infeasible, choice: Choice
) -> _Answer | None:
    """The evaluated plan that is better than the prediction; None where there is none.

    Predictions are compared with what they are worth: corrected by how far they were off for evaluated sets of as many
    units.
    """
    plans = evaluated_plans(report, wish.objective, wish.weights)
    best = plans.best(limit, wish.target)
    if best is None:
        return None
    reason = f"{best.plan!r} was evaluated on the search part: {_said(wish, best.value)}"
    if isinstance(found, Infeasible) or best.choice == choice:
        return _Answer(choice=best.choice, reason=f"{reason}, the best of the evaluated plans")
    error = plans.error_of_prediction(options, wish.objective, wish.weights, len(choice))
    if not _is_better(best, found, found.value + error, wish.target):
        return None
    off = f", {found.value + error:.4g} with the mean error of such predictions" if error else ""
    return _Answer(
        choice=best.choice,
        reason=f"{reason}, better than {spelled(choice) or 'nothing'}, which is predicted {found.value:.4g}{off}",
    )


def _is_better(best: Evaluated, found: Allocation, expected: float, target: float | None) -> bool:
    if target is None:
        return best.value <= expected
    return expected > target or best.bytes_ <= found.bytes_


def _nothing(report: SweepReport, wish: Wish, limit: int | None, options: Options, free: list[str]) -> str:
    """Why an allocation leaves everything on the grid."""
    given = bytes_of(report, wish.overrides)
    if limit is None:
        value = weigh(options.base, wish.objective, wish.weights)
        return f"the target is reached with nothing protected: {_said(wish, value)}"
    if options.cheapest <= limit - given:
        return "no choice within the budget is predicted to lower the damage"
    if wish.max_overhead is not None and len(report.precisions) == 1:
        return too_dear(report, free, wish.max_overhead, wish.overrides)
    return f"the cheapest change takes {options.cheapest} bytes and the budget leaves {max(limit - given, 0)}"


def _remarks(report: SweepReport, choice: Choice, ranking: Ranking) -> tuple[str, ...]:
    """How far the ranking behind a choice can be trusted, and what of the choice no checkpoint holds."""
    if not choice:
        return ()
    own = precision_of_bits(report.grid.bits)
    simulated = sorted({kind for kind in choice.values() if kind not in (*IN_CHECKPOINTS, own)})
    trust = f"{'' if ranking.stable else 'unstable ranking: '}{ranking.reason}"
    if not simulated:
        return (trust,)
    return (
        trust,
        f"{', '.join(simulated)} is simulated: no checkpoint format here holds it, and this plan cannot be exported; "
        "sweep with --precisions fp16,int8 for one that can",
    )


def spelled(choice: Choice) -> str:
    """`0,3:int8,5.down`: units without a precision keep 16 bit."""
    return ",".join(
        unit.removeprefix("layers.") + ("" if kind == "fp16" else f":{kind}") for unit, kind in choice.items()
    )


def _said(wish: Wish, value: float) -> str:
    return f"{wish.objective} {value:.4g} bits per byte"


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
        """Damage per language, added up from what single units do; units that are not named are on the grid."""
        found = dict(self.base)
        for unit, options in self.damage.items():
            for language, added in options[choice.get(unit, self.quantized)].items():
                found[language] += added
        return found

    @property
    def cheapest(self) -> int:
        """The fewest extra bytes that raise the precision of one unit."""
        dearer = (size - own[self.quantized] for own in self.bytes_.values() for size in own.values())
        return min((extra for extra in dearer if extra > 0), default=0)


def options_of(report: SweepReport, overrides: Choice) -> Options:
    """Every unit that can be chosen, in the precisions that it was swept at and did not collapse in.

    Under `protect-one` a choice takes from the damage of the all-quantized model, under `quantize-one` it adds to the
    16-bit model's.

    Args:
        report: the sweep.
        overrides: what the user gave; these units are no choice, and are paid for.
    """
    free, quantized = candidates(report, report.units, overrides), precision_of_bits(report.grid.bits)
    mode: Mode = "protect-one" if "protect-one" in report.modes else "quantize-one"
    states = {unit: _states(report, unit, mode, quantized) for unit in free}
    languages = [name for name, status in report.languages.items() if status == "supported"]
    over = NONE if mode == "protect-one" else BASELINE
    damage, base = predict_damage(report.scores, states, languages, over=over)
    bytes_ = {unit: _bytes(report, unit, tuple(states[unit]), overrides, quantized) for unit in free}
    other = bytes_of(report, overrides) - sum(own[quantized] for own in bytes_.values())
    return Options(bytes_=bytes_, damage=damage, base=base, other_bytes=other, quantized=quantized)


def _states(report: SweepReport, unit: str, mode: Mode, quantized: Precision) -> dict[Precision, str]:
    """Precision of a unit → the state in which it alone differs from the state that damage is counted over."""
    if mode == "quantize-one":
        return {"fp16": BASELINE, quantized: plan_name(mode, [unit])}
    plans = {kind: plan_name(mode, [unit], kind) for kind in report.precisions}
    lost = {row.plan for row in report.rows if any(damage.status == "collapsed" for damage in row.damage)}
    return {quantized: NONE} | {kind: plan for kind, plan in plans.items() if plan not in lost}


def _bytes(
    report: SweepReport, unit: str, precisions: Sequence[Precision], overrides: Choice, quantized: Precision
) -> dict[Precision, int]:
    """What a unit costs in each precision. Units of its layer that the user gave a precision keep it, and its price."""
    _, layer, *group = unit.split(".", 2)
    own = report.layer_bytes[".".join(["quantized", *group])][int(layer)]
    given = bytes_of(report, overrides)
    return {
        kind: own if kind == quantized else own + bytes_of(report, {**overrides, unit: kind}) - given
        for kind in precisions
    }
