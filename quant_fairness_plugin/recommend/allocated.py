"""Plans by allocation: the units' precisions under a budget or for a target, predicted or evaluated. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant_fairness_plugin.allocation import Allocation, Infeasible, allocate, byte_limit, weigh
from quant_fairness_plugin.allocation.program import Goal
from quant_fairness_plugin.artifacts import (
    Precision,
    ProtectionPlan,
    Ranking,
    SweepReport,
    bits_of_precision,
    precision_of_bits,
)
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, plan_of, priced_units
from quant_fairness_plugin.recommend.evaluated import Evaluated, evaluated_plans
from quant_fairness_plugin.recommend.options import Options, options_of
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
