"""Orders units by what protecting them is worth, and says how stable the order is.

Takes per-sentence scores; returns a `Ranking`. The first unit is the one most worth protecting: under `protect-one`
the plan that protects it has the lowest objective, under `quantize-one` the plan that quantizes it the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import scipy

from quant_fairness_plugin.artifacts import Bootstrap, LanguageDamage, Mode, Ranking, StateScores, Undefined
from quant_fairness_plugin.measure.damage import count_sentences, objective_draws, supported_languages
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.plans.plan_set import BASELINE, plan_name

# A unit is reliably among the first where more than half of the resamples choose it, too.
TOP_PROBABILITY = 0.5
# Then either the two halves of the sentences must agree on the whole order better than chance (one-sided test of
# Kendall's τ), or nearly all resamples must choose the same units, however the others are ordered.
HALVES_ALPHA = 0.05
RESOLVED_PROBABILITY = 0.95


def rank_units(
    scores: Mapping[str, StateScores],
    damage: Mapping[str, Sequence[LanguageDamage]],
    *,
    units: Sequence[str],
    mode: Mode,
    objective: str,
    top: int,
    bootstrap: Bootstrap,
) -> Ranking | Undefined:
    """Return the units from most to least worth protecting.

    Args:
        scores: per-sentence scores of the 16-bit state and of the plan of every unit.
        damage: each plan's damage, for the statuses of its languages.
        units: what to rank, by full name.
        mode: which plans to rank by.
        objective: what to rank by.
        top: the stability figures are about the first `top` units.
        bootstrap: resamples of the sentences, and the reference of objectives that need one.

    Returns:
        The ranking, or `Undefined` where a plan's objective is: no language is supported, one collapsed, or a
        denominator is not above 0.

    Raises:
        ConfigError: an unknown objective.
    """
    plans = [plan_name(mode, [unit]) for unit in units]
    languages = supported_languages(damage[plans[0]])
    if problem := _problem(damage, plans, languages) or _lacks_reference(objective, languages, bootstrap.reference):
        return Undefined(problem)
    baseline = scores[BASELINE]
    resamples = Resamples.of(bootstrap, count_sentences(baseline))
    weights = np.vstack([resamples.weights, _halves(resamples.sentences)])
    draws = partial(objective_draws, baseline, languages=languages, objective=objective, weights=weights)
    # [1 + draws + 2, units], turned so that low is always "most worth protecting"
    values = np.column_stack([draws(scores[plan], reference=bootstrap.reference) for plan in plans])
    if np.isnan(values).any():
        return Undefined(f"{objective} is undefined for some resamples: the reference language did not clearly lose")
    sign = 1.0 if mode == "protect-one" else -1.0
    return _ranking(objective, units, sign * values, min(top, len(units) - 1))


def _ranking(objective: str, units: Sequence[str], values: Array, top: int) -> Ranking:
    """The ranking by `values` `[1 + draws + 2, units]`: the estimate, each resample, and the two halves."""
    estimates, drawn, halves = values[0], values[1:-2], values[-2:]
    order = np.argsort(estimates, kind="stable")
    among_first = np.argsort(np.argsort(drawn, axis=1, kind="stable"), axis=1, kind="stable") < top
    probability = among_first.mean(axis=0)
    agreement = scipy.stats.kendalltau(halves[0], halves[1], alternative="greater")
    tau = None if np.isnan(agreement.statistic) else round(float(agreement.statistic), 4)
    weakest = float(probability[order[:top]].min())
    agreeing = tau is not None and bool(agreement.pvalue < HALVES_ALPHA)
    return Ranking(
        objective=objective,
        units=tuple(units[i] for i in order),
        top_probability=tuple(round(float(probability[i]), 4) for i in order),
        top=top,
        kendall_tau_halves=tau,
        stable=weakest > TOP_PROBABILITY and tau is not None and (agreeing or weakest >= RESOLVED_PROBABILITY),
        reason=(
            f"the first {top} come first in at least {weakest:.0%} of resamples; "
            + ("all units tie" if tau is None else f"two halves of the sentences agree with τ = {tau:.2f}")
        ),
    )


def _problem(damage: Mapping[str, Sequence[LanguageDamage]], plans: Sequence[str], languages: Sequence[str]) -> str:
    if not languages:
        return "the 16-bit model supports none of the languages, or all collapsed"
    for plan in plans:
        if collapsed := [row.language for row in damage[plan] if row.status == "collapsed"]:
            return f"plan {plan!r} collapsed in {', '.join(collapsed)}"
    return ""


def _lacks_reference(objective: str, languages: Sequence[str], reference: str | None) -> str:
    if not find_objective(objective).problem(languages, reference):
        return ""
    return f"{objective} needs a supported reference language and another one; the reference is {reference}"


def _halves(sentences: int) -> Array:
    """Two 0/1 rows that split the sentences alternately: [2, sentences]."""
    even = (np.arange(sentences) % 2 == 0).astype(np.float64)
    return np.stack([even, 1.0 - even])
