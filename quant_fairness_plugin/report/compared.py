"""The damage that a report is about, with the damage before protection where both were measured alike."""

from __future__ import annotations

from dataclasses import dataclass

from quant_fairness_plugin.artifacts import LanguageDamage, Precision, ProtectionPlan, SweepReport, SweepRow, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import NONE
from quant_fairness_plugin.recommend.assembly import bytes_of, row_choice
from quant_fairness_plugin.report.sources import Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One or two states of a model, by language."""

    after: tuple[LanguageDamage, ...]
    name_after: str
    before: tuple[LanguageDamage, ...] = ()
    name_before: str = "without protection"
    condition: str
    """On which sentences, and with which weights."""


def compare(sources: Sources, recommended: ProtectionPlan | None) -> Compared | None:
    """Return what to show first: a checkpoint's measurement, else the plans of a sweep; None where there is neither.

    Only what was measured together is compared: a checkpoint with the measurement `before`, or two plans of a sweep.
    """
    if sources.measurement is not None:
        measured = sources.measurement
        return Compared(
            after=measured.languages,
            name_after="this checkpoint",
            before=() if sources.before is None else sources.before.languages,
            condition=_sentences(measured.held_out, measured.condition, measured.part),
        )
    if sources.before is not None:
        measured = sources.before
        condition = _sentences(measured.held_out, measured.condition, measured.part)
        return Compared(after=measured.languages, name_after="without protection", condition=condition)
    if sources.sweep is None:
        return None
    return _of_sweep(sources.sweep, recommended)


def _sentences(held_out: bool | None, condition: str, part: str) -> str:
    if held_out:
        return f"Measured on sentences that neither calibration nor a search used (part {part})."
    return f"Not held out, so losses may look too small: {condition or 'what the sentences were used for is unknown'}."


def _of_sweep(sweep: SweepReport, recommended: ProtectionPlan | None) -> Compared | None:
    none = next((row for row in sweep.rows if row.plan == NONE), None)
    chosen = None if recommended is None else evaluated_row(sweep, recommended)
    condition = "A forecast: weights rounded in memory, on the sentences that the plan is chosen by. No checkpoint yet."
    if none is None:
        return None
    if chosen is None or chosen is none:
        return Compared(after=none.damage, name_after="without protection", condition=condition)
    name = "with the recommended plan"
    return Compared(after=chosen.damage, name_after=name, before=none.damage, condition=condition)


def evaluated_row(sweep: SweepReport, plan: ProtectionPlan) -> SweepRow | None:
    """Return the row of a sweep that gives every unit what a plan gives it; None where no such plan was evaluated."""
    wanted = choice_of(plan)
    rows = (row for row in sweep.rows if row.mode != "quantize-one")
    return next((row for row in rows if dict(row_choice(sweep, row)) == wanted), None)


def size_of(sweep: SweepReport, plan: ProtectionPlan) -> int | None:
    """Return the bytes of a plan; None where it has a unit or a precision that the sweep did not price."""
    try:
        return bytes_of(sweep, choice_of(plan))
    except ConfigError:
        return None


def choice_of(plan: ProtectionPlan) -> dict[str, Precision]:
    """Return what a plan singles out: unit → precision."""
    whole: dict[str, Precision] = {str(Unit(layer)): "fp16" for layer in plan.protected_layers}
    return whole | plan.overrides
