"""What there is to choose from: each unit's bytes and predicted damage in every swept precision. Step 5, plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant_fairness_plugin.allocation.prediction import predict_damage
from quant_fairness_plugin.artifacts import Mode, Precision, SweepReport, precision_of_bits
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of
from quant_fairness_plugin.recommend.ranked import candidates
from quant_fairness_plugin.sweep.ranking import BASELINE, NONE, plan_name


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
