from __future__ import annotations

import math

import pytest

from quant_fairness_plugin.artifacts import Interval, Number, Undefined
from quant_fairness_plugin.statistics.labels import (
    LAYER_LABELS,
    fair_efficiency_score,
    label,
    legacy_label,
    throughput_over_disparity,
)

NOTHING = Undefined("the KL of en is 0")


@pytest.mark.parametrize(
    ("disparity", "seeds", "ours"),
    [
        (Interval(0.3, 0.2, 0.4), "EXCELLENT", "others lose less"),
        (Interval(0.5, 0.4, 1.0), "VERY GOOD", "no difference shown"),
        (Interval(1.47, 1.2, 1.6), "GOOD", "others lose more"),
        (Interval(2.0, 0.5, 9.0), "NEEDS WORK", "no difference shown"),
        (NOTHING, "undefined", "undefined"),
    ],
)
def test_labels_go_by_the_estimate_there_and_by_the_interval_here(disparity: Number, seeds: str, ours: str) -> None:
    assert (legacy_label(disparity), label(disparity)) == (seeds, ours)


def test_layers_have_labels_of_their_own() -> None:
    labels = [legacy_label(Interval(value, value, value), LAYER_LABELS) for value in (0.9, 1, 10, 50)]
    assert labels == ["CRITICAL", "Important", "Moderate", "Low priority"]


def test_fair_efficiency_falls_with_the_disparity_and_its_interval_turns() -> None:
    disparity = Interval(2.0, 0.5, 4.0)
    assert throughput_over_disparity(3.0, disparity) == Interval(1.5, 0.75, 6.0)
    assert fair_efficiency_score(2.0, disparity) == Interval(1.0, math.sqrt(0.5), math.sqrt(2))  # never above its root


@pytest.mark.parametrize("formula", [throughput_over_disparity, fair_efficiency_score])
@pytest.mark.parametrize("disparity", [NOTHING, Interval(0.1, 0.0, 0.2), Interval(0.1, -0.2, 0.4)])
def test_without_a_disparity_there_is_no_fair_efficiency(formula: object, disparity: Number) -> None:
    assert callable(formula)
    assert isinstance(formula(2.0, disparity), Undefined)
