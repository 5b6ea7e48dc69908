"""Whether layers at the same relative depth are worth the same in different models; no model is loaded.

Takes saved sweeps of layers; returns Kendall's τ-b of each two, and how often the research's gateway layers come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from quant_fairness_plugin.analysis.correlations import kendall, kendall_p
from quant_fairness_plugin.analysis.gateways import GatewayLayers, gateway_share
from quant_fairness_plugin.analysis.predictors import OBJECTIVE
from quant_fairness_plugin.analysis.request import SavedRequest
from quant_fairness_plugin.analysis.swept import read_sweeps
from quant_fairness_plugin.artifacts import Mode, Number, Undefined
from quant_fairness_plugin.measure.intervals import benjamini_hochberg, interval
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.statistics.series import ALPHA, Series


@dataclass(frozen=True, slots=True)
class DepthPair:
    """Two sweeps."""

    first: str
    second: str
    mode: Mode
    depths: int
    """The shallower model's; the other's values are interpolated between its layers, linearly."""
    paired: bool
    """Both have the same sentences, which are resampled together; otherwise each has its own."""
    tau: Number
    adjusted_p: float | Undefined
    """One-sided, exact: the share of all orders of so many layers that agree as well or better, then Benjamini-Hochberg
    over the pairs. Too small where neighbours are alike in both models; interpolation, of one, does no harm."""
    verdict: str
    """Of `verdict`: `alike`, `not alike` or `undecided`."""


@dataclass(frozen=True, slots=True)
class Depths:
    """The answer of `analyze depth`."""

    objective: str
    languages: tuple[str, ...]
    pairs: tuple[DepthPair, ...]
    gateways: tuple[GatewayLayers, ...]


def analyse(request: SavedRequest) -> Depths:
    """Compare every two sweeps, in every mode that all of them have.

    Raises:
        ArtifactError: a file that is no sweep.
        ConfigError: sweeps that cannot be compared; see `read_sweeps`.
    """
    common = read_sweeps(request.options.sweep or (), request.config.languages)
    pairs, gateways = list[DepthPair](), list[GatewayLayers]()
    for mode in common.modes:
        worth = common.worth(mode, draws=request.config.draws, seed=request.config.seed)
        gateways += [gateway_share(*each, mode) for each in worth]
        for (first, one), (second, two) in combinations(worth, 2):
            depths, paired = min(first.report.layers, second.report.layers), first.sentences == second.sentences
            tau, p = compare(one, two, depths)
            pairs.append(DepthPair(first.name, second.name, mode, depths, paired, tau, p, verdict=""))
    return Depths(OBJECTIVE, common.languages, _judged(pairs), tuple(gateways))


def verdict(tau: Number, p_value: float | Undefined) -> str:
    """Return `alike`, `not alike` or `undecided`.

    `alike`: all of the interval is above 0, and so few layers would agree as well by chance with p < 0.05; the interval
    knows of sentences alone. `not alike`: nothing of the interval is above 0.
    """
    if isinstance(tau, Undefined):
        return "undecided"
    if tau.high <= 0:
        return "not alike"
    by_chance = isinstance(p_value, Undefined) or p_value >= ALPHA
    return "undecided" if tau.low <= 0 or by_chance else "alike"


def compare(first: Series, second: Series, depths: int) -> tuple[Number, float | Undefined]:
    """Return τ-b of two models over so many depths, from the top to the bottom, and its exact one-sided p-value.

    Args:
        first: what each layer is worth, `[1 + draws, layers]`, the estimate first.
        second: the same of the other model.
        depths: at how many.
    """
    if isinstance(first, Undefined):
        return first, first
    if isinstance(second, Undefined):
        return second, second
    one, two = at_depths(first, depths), at_depths(second, depths)
    taus = kendall(one, two)
    if np.isnan(taus).any():
        flat = Undefined("the layers of one of the two do not differ")
        return flat, flat
    return interval(taus), kendall_p(one[0], two[0])


def at_depths(values: Array, depths: int) -> Array:
    """Return `[rows, layers]` as `[rows, depths]`, linearly interpolated; layer l of L lies at depth l / (L - 1)."""
    last = values.shape[1] - 1
    places = np.linspace(0, last, depths)
    below = np.minimum(places.astype(int), last - 1)
    between: Array = values[:, below] + (places - below) * (values[:, below + 1] - values[:, below])
    return between


def _judged(pairs: Sequence[DepthPair]) -> tuple[DepthPair, ...]:
    adjusted = iter(benjamini_hochberg([p for row in pairs if not isinstance(p := row.adjusted_p, Undefined)]))
    known = [p if isinstance(p := row.adjusted_p, Undefined) else significant(next(adjusted)) for row in pairs]
    rows = zip(pairs, known, strict=True)
    return tuple(replace(row, adjusted_p=p, verdict=verdict(row.tau, p)) for row, p in rows)
