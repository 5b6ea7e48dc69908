"""How often the research's gateway layers are the ones most worth protecting, in one sweep."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

from quant_fairness_plugin.analysis.swept import Swept
from quant_fairness_plugin.artifacts import Mode, Undefined
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.plans.controls import gateway_layers
from quant_fairness_plugin.statistics.series import Series


@dataclass(frozen=True, slots=True)
class GatewayLayers:
    """The research's gateway layers in one sweep: the first, the one at three quarters, the last."""

    sweep: str
    mode: Mode
    layers: int
    grid: str
    gateways: tuple[int, ...]
    among_first: tuple[float, ...] | Undefined
    """Share of the resamples in which each is among as many layers most worth protecting."""
    all_first: float | Undefined
    """Share in which they are these layers."""
    all_by_chance: float


def gateway_share(swept: Swept, worth: Series, mode: Mode) -> GatewayLayers:
    """Return in which share of the resamples the gateway layers are worth most.

    Args:
        swept: the sweep.
        worth: of each layer, `[1 + draws, layers]`, the estimate first.
        mode: what `worth` is of.
    """
    report = swept.report
    gateways = gateway_layers(report.layers)
    each: tuple[float, ...] | Undefined
    every: float | Undefined
    if isinstance(worth, Undefined):
        each = every = worth
    else:
        places = np.argsort(np.argsort(-worth[1:], axis=1, kind="stable"), axis=1, kind="stable")
        first = places[:, gateways] < len(gateways)
        each, every = tuple(first.mean(axis=0).tolist()), float(first.all(axis=1).mean())
    chance = significant(1 / comb(report.layers, len(gateways)))
    return GatewayLayers(swept.name, mode, report.layers, str(report.grid), gateways, each, every, chance)
