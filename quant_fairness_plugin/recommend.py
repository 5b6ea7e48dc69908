"""Step 5 of 8: from a sweep to a plan, under a number of layers or a byte budget, with the reasons.

Takes a `SweepReport`, returns a `ProtectionPlan`. Needs no model and no torch: another budget is solved at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from quant_fairness_plugin.artifacts import (
    Grid,
    Objective,
    Precision,
    ProtectionPlan,
    Ranking,
    SweepReport,
    Undefined,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.sweep.ranking import Mode, layer_plan, rank_layers
from quant_fairness_plugin.sweep.sizes import plan_bytes


def recommend_plan(
    report: SweepReport,
    *,
    objective: Objective = "worst",
    top: int | None = None,
    max_overhead: float = 0.2,
    strict: bool = False,
    draws: int = 2000,
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

    Raises:
        ConfigError: `top` is not a number of layers, or the objective is undefined for this sweep.
        QualityGateError: the ranking is unstable and `strict` is set.
    """
    if top is not None and not 1 <= top < report.layers:
        raise ConfigError(
            f"top {top} is not a number of layers; the model has {report.layers}, use 1..{report.layers - 1}"
        )
    budgeted = _affordable(report, max_overhead)
    ranking = _rank(report, objective, top or max(budgeted, 1), draws)
    if strict and not ranking.stable:
        raise QualityGateError(f"the ranking by {objective} is unstable: {ranking.reason}; measure more sentences")
    if top is not None:
        reasons = (f"asked for {top} layers; {ranking.reason}",)
        return _plan(report, ranking.layers[:top], f"top {top} by {objective}", reasons, ranking.stable)
    source = f"auto by {objective} under {max_overhead:.0%} extra bytes"
    if not budgeted:
        return _plan(
            report, (), source, (f"one layer costs more than the budget of {max_overhead:.0%}",), ranking.stable
        )
    if not ranking.stable:
        return _plan(report, (), source, (f"unstable ranking, so nothing is protected: {ranking.reason}",), False)
    return _plan(report, ranking.layers[:budgeted], source, (ranking.reason,), True)


def explicit_plan(
    layers: Sequence[int], *, model: str, grid: Grid, layer_bytes: dict[str, tuple[int, ...]], other_bytes: int
) -> ProtectionPlan:
    """The plan that the user named, with what it costs.

    Args:
        layers: protected layers, checked; empty for none.
        model: the model's name.
        grid: grid of the other layers.
        layer_bytes: as in `SweepReport`.
        other_bytes: as in `SweepReport`.
    """
    return _assemble(
        layers, "explicit" if layers else "none", ("chosen by the user",), True, model, grid, layer_bytes, other_bytes
    )


def _affordable(report: SweepReport, max_overhead: float) -> int:
    """How many layers of the costliest kind fit the budget, so that any choice of that many does."""
    floor = plan_bytes(report.layer_bytes, report.other_bytes, ())
    pairs = zip(report.layer_bytes["fp16"], report.layer_bytes["quantized"], strict=True)
    costliest = max(dense - packed for dense, packed in pairs)
    if costliest <= 0:
        return 0
    return min(int(max_overhead * floor / costliest), report.layers - 1)


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
    report: SweepReport, layers: Sequence[int], source: str, reasons: tuple[str, ...], stable: bool
) -> ProtectionPlan:
    return _assemble(
        layers, source, reasons, stable, report.provenance.model, report.grid, report.layer_bytes, report.other_bytes
    )


def _assemble(
    layers: Sequence[int],
    source: str,
    reasons: tuple[str, ...],
    stable: bool,
    model: str,
    grid: Grid,
    layer_bytes: dict[str, tuple[int, ...]],
    other_bytes: int,
) -> ProtectionPlan:
    keep = set(layers)
    quantized: Precision = _precision(grid)
    floor = plan_bytes(layer_bytes, other_bytes, ())
    extra = plan_bytes(layer_bytes, other_bytes, keep) - floor
    return ProtectionPlan(
        model=model,
        units={f"layers.{i}": "fp16" if i in keep else quantized for i in range(len(layer_bytes["fp16"]))},
        grid=grid,
        source=source,
        reasons=reasons,
        stable=stable,
        predicted=True,
        extra_bytes=extra,
        overhead=round(extra / floor, 6),
    )


def _precision(grid: Grid) -> Precision:
    by_bits: dict[int, Precision] = {2: "int2", 3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8"}
    if grid.bits not in by_bits:
        raise ConfigError(f"{grid.bits} bits have no name in a plan; use one of {', '.join(map(str, by_bits))}")
    return by_bits[grid.bits]
