"""Step 5 of 8: from a sweep to a plan, under a number of layers or a byte budget, with the reasons.

Takes a `SweepReport`, returns a `ProtectionPlan`. Needs no model and no torch: another budget is solved at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from quant_fairness_plugin.sweep.ranking import Mode, layer_plan, rank_layers
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
    """The layers to keep in 16 bit.

    With `top`, exactly that many layers, in the order of the ranking, whether or not the ranking is stable. Without it,
    as many layers from the front of the ranking as fit the byte budget, and none where the ranking is unstable.

    The plan is a prediction until it is itself evaluated (`predicted`).

    Args:
        report: a sweep with single-layer plans.
        objective: what to rank by.
        top: number of layers; None = by budget.
        max_overhead: budget, extra bytes over the all-quantized checkpoint (0.2 = 20 %).
        strict: raise instead of returning an unstable plan.
        draws: bootstrap resamples of the stability figures.
        overrides: precisions that the user gave to layers (`layers.5`), which are then no candidates, and to units
            (`layers.3.down`), which do not count where their whole layer is chosen. They are paid from the budget.

    Raises:
        ConfigError: `top` is not a number of layers, or the objective is undefined for this sweep.
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    if top is not None and not 1 <= top < report.layers:
        raise ConfigError(
            f"top {top} is not a number of layers; the model has {report.layers}, use 1..{report.layers - 1}"
        )
    budgeted = _affordable(report, max_overhead, overrides)
    ranking = _rank(report, objective, top or max(budgeted, 1), draws)
    if strict and not ranking.stable:
        raise QualityGateError(f"the ranking by {objective} is unstable: {ranking.reason}; measure more sentences")
    candidates = [layer for layer in ranking.layers if f"layers.{layer}" not in overrides]
    if top is not None:
        if top > len(candidates):
            raise ConfigError(
                f"top {top} asks for more layers than the {len(candidates)} without a precision of their own; ask for "
                "fewer, or leave int8_layers out"
            )
        reasons = (f"asked for {top} layers; {ranking.reason}",)
        return _plan(report, candidates[:top], f"top {top} by {objective}", reasons, ranking.stable, overrides)
    source = f"auto by {objective} under {max_overhead:.0%} extra bytes"
    if not budgeted:
        reason = f"one layer costs more than the budget of {max_overhead:.0%}"
        return _plan(report, (), source, (reason,), ranking.stable, overrides)
    if not ranking.stable:
        reason = f"unstable ranking, so nothing is protected: {ranking.reason}"
        return _plan(report, (), source, (reason,), False, overrides)
    return _plan(report, candidates[:budgeted], source, (ranking.reason,), True, overrides)


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


def _affordable(report: SweepReport, max_overhead: float, overrides: Mapping[str, Precision]) -> int:
    """How many layers of the costliest kind fit what the overrides leave of the budget, so that any choice does."""
    floor = plan_bytes(report.layer_bytes, report.other_bytes, ())
    spent = plan_bytes(report.layer_bytes, report.other_bytes, (), overrides) - floor
    pairs = zip(report.layer_bytes["fp16"], report.layer_bytes["quantized"], strict=True)
    costliest = max(dense - packed for dense, packed in pairs)
    if costliest <= 0:
        return 0
    return max(0, min(int((max_overhead * floor - spent) / costliest), report.layers - 1))


def _rank(report: SweepReport, objective: Objective, top: int, draws: int) -> Ranking:
    mode: Mode = "protect-one" if layer_plan("protect-one", 0) in report.scores else "quantize-one"
    ranking = rank_layers(
        report.scores,
        {row.plan: row.damage for row in report.rows},
        layers=report.layers,
        mode=mode,
        objective=objective,
        reference=report.reference,
        top=top,
        draws=draws,
        seed=report.provenance.seed,
    )
    if isinstance(ranking, Undefined):
        raise ConfigError(
            f"layers cannot be ranked by {objective}: {ranking.undefined}; use --objective worst, mean or bpb"
        )
    return ranking


def _plan(
    report: SweepReport,
    layers: Sequence[int],
    source: str,
    reasons: tuple[str, ...],
    stable: bool,
    overrides: Mapping[str, Precision],
) -> ProtectionPlan:
    model, sizes = report.provenance.model, report.layer_bytes
    return _assemble(layers, source, reasons, stable, model, report.grid, sizes, report.other_bytes, overrides)


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
    keep = set(layers)
    own = {name: kind for name, kind in overrides.items() if int(name.split(".")[1]) not in keep}
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
