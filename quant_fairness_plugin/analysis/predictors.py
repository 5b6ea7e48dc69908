"""How well figures that need no sweep predict what a sweep measured, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from quant_fairness_plugin.analysis.correlations import correlations, over_items
from quant_fairness_plugin.artifacts import Bootstrap, Mode, Number, SweepReport, Undefined, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import interval
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256
from quant_fairness_plugin.plans.plan_set import plan_name
from quant_fairness_plugin.statistics.series import Series, plan_series

OBJECTIVE = "worst"


@dataclass(frozen=True, slots=True)
class LayerScore:
    """A score of the layers beside what quantizing or protecting each of them did."""

    score: str
    against: str
    """The mode of the sweep and the objective."""
    layers: int
    rho: Number
    """Spearman's correlation of score and importance, with the interval over resampled sentences."""
    rho_over_layers: Number
    """The same, with Fisher's interval: what so few layers can tell of others. The wider of the two counts."""
    r_squared: Number
    """Of the straight line of importance on score, with the interval over sentences."""


def compare_scores(
    scores: Mapping[str, Sequence[float]], swept: SweepReport, files: ModelFiles, draws: int = 2000
) -> tuple[LayerScore, ...]:
    """Compare scores of all layers with a sweep of the same model, for each of its modes.

    Args:
        scores: name → one figure per layer; high means: protect first.
        swept: its per-sentence scores give the intervals.
        files: the model that the scores are of.
        draws: resamples of the sentences.

    Raises:
        ConfigError: the sweep is of another model, or of fusion groups.
    """
    if swept.granularity != "layer" or swept.provenance.model_sha256 != model_sha256(files):
        what = "of units" if swept.granularity != "layer" else f"of another model ({swept.provenance.model})"
        raise ConfigError(f"the sweep is {what}; expected one of the layers of {files.name}. Sweep it with --json")
    languages = [name for name, status in swept.languages.items() if status == "supported"]
    rows = []
    for mode in swept.modes:
        importance = layer_importance(swept, mode, languages, Bootstrap(swept.reference, draws))
        for name, score in scores.items():
            if isinstance(importance, Undefined):
                rows.append(LayerScore(name, f"{mode} {OBJECTIVE}", swept.layers, importance, importance, importance))
            else:
                rows.append(_compare(name, f"{mode} {OBJECTIVE}", np.array(score), importance))
    return tuple(rows)


def layer_importance(swept: SweepReport, mode: Mode, languages: Sequence[str], bootstrap: Bootstrap) -> Series:
    """Return what each layer is worth, `[1 + draws, layers]`, the estimate first: high means protect first.

    Args:
        swept: a sweep of layers.
        mode: one of its modes.
        languages: those that count.
        bootstrap: resamples of the sentences.
    """
    plans = [plan_name(mode, [str(Unit(layer))]) for layer in range(swept.layers)]
    lost = {
        row.plan: [each.language for each in row.damage if each.status == "collapsed" and each.language in languages]
        for row in swept.rows
    }
    series = plan_series(swept.scores, plans, languages, objective=OBJECTIVE, bootstrap=bootstrap, collapsed=lost)
    values = [value for value in series.values() if not isinstance(value, Undefined)]
    if len(values) < len(plans):
        return next(value for value in series.values() if isinstance(value, Undefined))
    signed: Array = (-1.0 if mode == "protect-one" else 1.0) * np.column_stack(values)
    return signed


def _compare(name: str, against: str, score: Array, importance: Array) -> LayerScore:
    """`importance` is `[1 + draws, layers]`, the estimate first."""
    count = len(score)
    if np.ptp(score) == 0 or np.any(np.ptp(importance, axis=1) == 0):
        flat = Undefined("the layers do not differ")
        return LayerScore(name, against, count, flat, flat, flat)
    rho = correlations(rankdata(score), np.apply_along_axis(rankdata, 1, importance))
    linear = correlations(score, importance)
    return LayerScore(
        name, against, count, interval(rho), over_items(float(rho[0]), count), interval(np.square(linear))
    )
