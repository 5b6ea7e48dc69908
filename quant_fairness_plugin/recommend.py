"""Step 5 of 8: from a sweep to a plan, under a number of units or a byte budget, with the reasons.

Takes a `SweepReport`, returns a `ProtectionPlan`. Needs no model and no torch: another budget is solved at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from quant_fairness_plugin.artifacts import (
    Grid,
    Objective,
    Precision,
    ProtectionPlan,
    Ranking,
    SweepReport,
    Undefined,
    bits_of_precision,
    precision_of_bits,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.sweep.ranking import rank_units
from quant_fairness_plugin.sweep.sizes import NO_OVERRIDES, LayerBytes, plan_bytes


def recommend_plan(
    report: SweepReport,
    *,
    objective: Objective = "worst",
    top: int | None = None,
    max_overhead: float = 0.2,
    strict: bool = False,
    draws: int = 2000,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
) -> ProtectionPlan:
    """The units to keep in 16 bit: layers, or fusion groups where those were swept.

    With `top`, exactly that many, in the order of the ranking, whether or not the ranking is stable. Without it, as
    many from the front of the ranking as fit the byte budget, and none where the ranking is unstable.

    The plan is a prediction until it is itself evaluated (`predicted`).

    Args:
        report: a sweep, of layers or of units.
        objective: what to rank by.
        top: number of units; None = by budget.
        max_overhead: budget, extra bytes over the all-quantized checkpoint (0.2 = 20 %).
        strict: raise instead of returning an unstable plan.
        draws: bootstrap resamples of the stability figures.
        overrides: precisions that the user gave to layers (`layers.5`), which with all their units are then no
            candidates, and to units (`layers.3.down`), which do not count where their whole layer is chosen. They are
            paid from the budget.

    Raises:
        ConfigError: `top` is not a number of units, or the objective is undefined for this sweep.
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    count, what = len(report.units), "layers" if report.granularity == "layer" else "units"
    if top is not None and not 1 <= top < count:
        raise ConfigError(f"top {top} is not a number of {what}; the sweep has {count}, use 1..{count - 1}")
    candidates = [unit for unit in _rank(report, objective, 1, draws).units if not _is_given(unit, overrides)]
    affordable = _affordable(report, candidates, max_overhead, overrides)
    ranking = _rank(report, objective, top or max(affordable, 1), draws)
    if strict and not ranking.stable:
        raise QualityGateError(f"the ranking by {objective} is unstable: {ranking.reason}; measure more sentences")
    if top is not None:
        if top > len(candidates):
            raise ConfigError(
                f"top {top} asks for more {what} than the {len(candidates)} without a precision of their own; ask for "
                "fewer, or leave int8_layers out"
            )
        reasons = (f"asked for {top} {what}; {ranking.reason}",)
        return _plan(report, candidates[:top], f"top {top} by {objective}", reasons, ranking.stable, overrides)
    source = f"auto by {objective} under {max_overhead:.0%} extra bytes"
    if not affordable:
        reason = _too_dear(report, candidates, max_overhead, overrides)
        return _plan(report, (), source, (reason,), ranking.stable, overrides)
    if not ranking.stable:
        reason = f"unstable ranking, so nothing is protected: {ranking.reason}"
        return _plan(report, (), source, (reason,), False, overrides)
    return _plan(report, candidates[:affordable], source, (ranking.reason,), True, overrides)


def explicit_plan(
    layers: Sequence[int],
    *,
    model: str,
    grid: Grid,
    layer_bytes: LayerBytes,
    other_bytes: int,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
) -> ProtectionPlan:
    """The plan that the user named, with what it costs.

    Args:
        layers: protected layers, checked; empty for none.
        model: the model's name.
        grid: grid of the other layers.
        layer_bytes: as in `SweepReport`.
        other_bytes: as in `SweepReport`.
        overrides: precisions of single layers and units, as in `ProtectionPlan.overrides`.

    Raises:
        ConfigError: an override of a unit that `layer_bytes` does not know.
    """
    source = "explicit" if layers or overrides else "none"
    reasons = ("chosen by the user",)
    return _assemble(layers, source, reasons, True, model, grid, layer_bytes, other_bytes, overrides)


def describe_overrides(plan: ProtectionPlan) -> str:
    """What a plan gives single layers and units, in words: `layers 3, 5 in 8 bit; 7.down in 16 bit`. Empty if none."""
    groups: dict[tuple[Precision, bool], list[str]] = {}
    for name, precision in plan.overrides.items():
        place = name.removeprefix("layers.")
        groups.setdefault((precision, place.isdigit()), []).append(place)
    return "; ".join(
        f"{'' if not whole else 'layer ' if len(places) == 1 else 'layers '}{', '.join(places)} in "
        f"{bits_of_precision(precision)} bit"
        for (precision, whole), places in groups.items()
    )


def _is_given(unit: str, overrides: Mapping[str, Precision]) -> bool:
    """Whether the user gave a precision to the unit, or to the layer that it is in."""
    return unit in overrides or ".".join(unit.split(".")[:2]) in overrides


def _affordable(
    report: SweepReport, candidates: Sequence[str], max_overhead: float, overrides: Mapping[str, Precision]
) -> int:
    """How many of the candidates, from the front, fit the budget; never all units of the model."""
    budget = max_overhead * plan_bytes(report.layer_bytes, report.other_bytes, ())
    longest = min(len(candidates), len(report.units) - 1)
    fits = (_extra_bytes(report, candidates[: n + 1], overrides) <= budget for n in range(longest))
    return sum(takewhile(bool, fits))


def _too_dear(
    report: SweepReport, candidates: Sequence[str], max_overhead: float, overrides: Mapping[str, Precision]
) -> str:
    """Why nothing fits the budget."""
    if not candidates:
        return "every unit has a precision of its own already"
    floor = plan_bytes(report.layer_bytes, report.other_bytes, ())
    extra = _extra_bytes(report, candidates[:1], overrides)
    what = "one layer" if report.granularity == "layer" else "one unit"
    return (
        f"{what} costs more than the budget of {max_overhead:.2%}: the first of the ranking, "
        f"{candidates[0].removeprefix('layers.')}, takes {extra / floor:.2%}"
        f"{' with the precisions that were given' if overrides else ''}"
    )


def _extra_bytes(report: SweepReport, chosen: Sequence[str], overrides: Mapping[str, Precision]) -> int:
    """Bytes that a choice costs over quantizing everything."""
    keep, own = _placed(chosen, overrides)
    sizes, other = report.layer_bytes, report.other_bytes
    return plan_bytes(sizes, other, keep, own) - plan_bytes(sizes, other, ())


def _placed(chosen: Sequence[str], overrides: Mapping[str, Precision]) -> tuple[tuple[int, ...], dict[str, Precision]]:
    """Chosen units as layers that keep 16 bit as a whole, and precisions of single layers and units elsewhere."""
    keep = sorted(int(name.split(".")[1]) for name in chosen if name.count(".") == 1)
    own: dict[str, Precision] = {**overrides, **{name: "fp16" for name in chosen if name.count(".") > 1}}
    return tuple(keep), {name: kind for name, kind in own.items() if int(name.split(".")[1]) not in keep}


def _rank(report: SweepReport, objective: Objective, top: int, draws: int) -> Ranking:
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


def _plan(
    report: SweepReport,
    chosen: Sequence[str],
    source: str,
    reasons: tuple[str, ...],
    stable: bool,
    overrides: Mapping[str, Precision],
) -> ProtectionPlan:
    model, sizes = report.provenance.model, report.layer_bytes
    keep, own = _placed(chosen, overrides)
    return _assemble(keep, source, reasons, stable, model, report.grid, sizes, report.other_bytes, own)


def _assemble(
    layers: Sequence[int],
    source: str,
    reasons: tuple[str, ...],
    stable: bool,
    model: str,
    grid: Grid,
    layer_bytes: LayerBytes,
    other_bytes: int,
    overrides: Mapping[str, Precision],
) -> ProtectionPlan:
    keep, own = _placed([f"layers.{layer}" for layer in layers], overrides)
    quantized = precision_of_bits(grid.bits)
    floor = plan_bytes(layer_bytes, other_bytes, ())
    extra = plan_bytes(layer_bytes, other_bytes, keep, own) - floor
    whole: dict[str, Precision] = {
        f"layers.{i}": "fp16" if i in keep else quantized for i in range(len(layer_bytes["fp16"]))
    }
    return ProtectionPlan(
        model=model,
        units=whole | own,
        grid=grid,
        source=source,
        reasons=reasons,
        stable=stable,
        predicted=True,
        extra_bytes=extra,
        overhead=round(extra / floor, 6),
    )
