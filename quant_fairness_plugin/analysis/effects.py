"""Two choices crossed: what each does alone, what both do together, and whether that is the sum. No torch.

Takes KL in bits per byte under the four combinations of two calibrations and two plans, resample by resample; returns
intervals. All effects are KL before minus KL after: above 0, the choice helped.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Interval, Number, Undefined
from quant_fairness_plugin.measure.intervals import interval
from quant_fairness_plugin.measure.metrics import Array

WORST = "worst"
"""Stands where a language stands, for the largest KL over the supported languages of each combination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What another calibration and a plan do to one language's KL (bits per byte), alone and together."""

    subject: str
    """A language, or `worst`."""
    calibration: Number
    """The other calibration, without protection."""
    calibration_protected: Number
    """The other calibration, both with the plan."""
    protection: Number
    """The plan, under the first calibration."""
    protection_calibrated: Number
    """The plan, under the other calibration."""
    both: Number
    interaction: Number
    """`both` minus the two effects alone: below 0, together they bring less than their sum."""
    relative_interaction: Number
    """The factor by which the two together divide KL, over the product of the factors of each alone. 1: neither
    changes what the other does in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoByTwo:
    """Two calibrations crossed with no protection and a plan; `effects` of the worst language, then of each."""

    first: str
    other: str
    effects: tuple[Effects, ...]

    @property
    def verdict(self) -> str:
        """What the figures say about the worst language, in words."""
        worst = self.effects[0]
        clauses = [
            _clause(f"{self.other} calibration instead of {self.first}", worst.calibration, "without protection")
        ]
        if not isinstance(worst.protection, Undefined):
            clauses += [
                _clause(f"{self.other} instead of {self.first}", worst.calibration_protected, "with protection"),
                _clause("protection", worst.protection, f"under {self.first} calibration"),
                _clause("protection", worst.protection_calibrated, f"under {self.other} calibration"),
                _clause_on_both(worst.interaction),
            ]
        return "; ".join(clauses)


def effects_of(subject: str, first: Array, other: Array, protected: tuple[Array, Array] | None) -> Effects:
    """Return the effects on one subject.

    Args:
        subject: a language, or `worst`.
        first: KL under the first calibration without protection, `[1 + draws]`, the estimate first.
        other: the same under the other calibration.
        protected: both again with the plan; None where nothing is protected.
    """
    if protected is None:
        return _alone(subject, interval(first - other), Undefined("nothing is protected"))
    first_protected, other_protected = protected
    both, calibration, protection = first - other_protected, first - other, first - first_protected
    dividing = other * first_protected
    return Effects(
        subject=subject,
        calibration=interval(calibration),
        calibration_protected=interval(first_protected - other_protected),
        protection=interval(protection),
        protection_calibrated=interval(other - other_protected),
        both=interval(both),
        interaction=interval(both - calibration - protection),
        relative_interaction=_ratio(dividing, first * other_protected),
    )


def undefined_effects(subject: str, reason: str) -> Effects:
    """Return the effects on a subject that has none to report, and why."""
    return _alone(subject, Undefined(reason), Undefined(reason))


def _alone(subject: str, calibration: Number, rest: Undefined) -> Effects:
    return Effects(
        subject=subject, calibration=calibration, calibration_protected=rest, protection=rest,
        protection_calibrated=rest, both=rest, interaction=rest, relative_interaction=rest,
    )  # fmt: skip


def _ratio(numerator: Array, denominator: Array) -> Number:
    if not (denominator > 0).all():
        return Undefined("a combination has no KL at all, so there is no factor")
    ratio: Array = numerator / denominator
    return interval(ratio)


def _clause(what: str, change: Number, where: str) -> str:
    """One effect as a clause."""
    if isinstance(change, Undefined):
        return f"what {what} does {where} is undefined: {change.undefined}"
    if change.low > 0:
        return f"{what} helps {where}: it lowers the worst language's KL by {_figures(change)}"
    if change.high < 0:
        return f"{what} does not help {where}: it raises the worst language's KL by {_figures(_negated(change))}"
    lowered = f"it lowers the worst language's KL by {_figures(change)}, which includes 0"
    return f"{what} does not measurably help {where}: {lowered}"


def _clause_on_both(change: Number) -> str:
    if isinstance(change, Undefined):
        return f"their interaction is undefined: {change.undefined}"
    if change.low > 0:
        return f"together they bring {_figures(change)} more than the sum of each alone"
    if change.high < 0:
        return f"together they bring {_figures(_negated(change))} less than the sum of each alone"
    return f"together they bring the sum of each alone, within {_figures(change)}"


def _figures(change: Interval) -> str:
    return f"{change.estimate:.5f} [{change.low:.5f}, {change.high:.5f}] bits per byte"


def _negated(change: Interval) -> Interval:
    return Interval(-change.estimate, -change.high, -change.low)
