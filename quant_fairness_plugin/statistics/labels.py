"""The seeds' labels and their Fair-Efficiency, each beside a reading that knows how sure a figure is. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from quant_fairness_plugin.artifacts import Interval, Number, Undefined

DISPARITY_LABELS = ((0.5, "EXCELLENT"), (1.0, "VERY GOOD"), (2.0, "GOOD"), (math.inf, "NEEDS WORK"))
"""Below each bound; by the estimate alone. 1.03 and 1.47, where other languages lose more than English, are GOOD."""
LAYER_LABELS = ((1.0, "CRITICAL"), (10.0, "Important"), (50.0, "Moderate"), (math.inf, "Low priority"))
"""Of the disparity with one layer kept, as the seeds' command line words it."""


def legacy_label(disparity: Number, labels: tuple[tuple[float, str], ...] = DISPARITY_LABELS) -> str:
    """Return the seeds' label of an estimate; `undefined` where there is none."""
    return "undefined" if isinstance(disparity, Undefined) else _label(disparity.estimate, labels)


def label(disparity: Number) -> str:
    """Return what an interval says: whether the other languages lose less or more than the reference, or neither."""
    match disparity:
        case Interval(high=high) if high < 1:
            return "others lose less"
        case Interval(low=low) if low > 1:
            return "others lose more"
        case Interval():
            return "no difference shown"
    return "undefined"


def throughput_over_disparity(throughput: float, disparity: Number) -> Number:
    """Return the first Fair-Efficiency: throughput / disparity, in the throughput's unit.

    It rises when the reference language is hurt, and by dividing by a disparity near 0; `score` at least stops at 1.
    """
    return _falling(disparity, lambda value: throughput / value)


def fair_efficiency_score(efficiency: float, disparity: Number) -> Number:
    """Return the second Fair-Efficiency: sqrt(efficiency × min(1, 1 / disparity))."""
    return _falling(disparity, lambda value: math.sqrt(efficiency * min(1.0, 1 / value)))


def _falling(disparity: Number, formula: Callable[[float], float]) -> Number:
    """Apply a formula that falls with the disparity: its interval's ends change places."""
    if isinstance(disparity, Undefined):
        return Undefined(f"the disparity is: {disparity.undefined}")
    if disparity.low <= 0:
        return Undefined(f"the disparity is {disparity.low:.3g} to {disparity.high:.3g}, not clearly above 0")
    return Interval(formula(disparity.estimate), formula(disparity.high), formula(disparity.low))


def _label(value: float, labels: tuple[tuple[float, str], ...]) -> str:
    return next(name for bound, name in labels if value < bound)
