from __future__ import annotations

from itertools import combinations

import pytest

from quant_fairness_plugin.artifacts import Interval, SweepReport
from quant_fairness_plugin.statistics.synergy import EvaluatedSets
from tests.planted import planted_sets

GAIN = {"layers.0": 1.0, "layers.1": 0.4, "layers.2": 0.6, "layers.3": 0.0}
SINGLE: dict[tuple[str, ...], float] = {(unit,): gain for unit, gain in GAIN.items()}
UNITS = tuple(GAIN)


def report(synergy: float = 0.5) -> SweepReport:
    """All pairs of four layers; 0 and 2 together bring `synergy` nats a sentence more than the sum."""
    pairs = list(combinations(UNITS, 2))
    gains: dict[tuple[str, ...], float] = {pair: GAIN[pair[0]] + GAIN[pair[1]] for pair in pairs}
    gains["layers.0", "layers.2"] += synergy
    return planted_sets(SINGLE | gains, noise=0.001)


def evaluated(synergy: float = 0.5) -> EvaluatedSets:
    return EvaluatedSets.of(report(synergy), draws=200)


def test_a_planted_synergy_is_found_among_all_pairs() -> None:
    found = evaluated().interactions(["protect-one"])
    assert list(found) == ["protect-one worst", "protect-one mean"]
    matrix = found["protect-one mean"]
    assert matrix.coverage == "6 of 6 pairs"
    cell = matrix.between("layers.0", "layers.2")
    assert cell is not None
    assert isinstance(cell.additive, Interval)
    assert cell.additive.low > 0
    for other in matrix.pairs:
        assert isinstance(other.additive, Interval)
        assert other is cell or abs(other.additive.estimate) < 0.05 * cell.additive.estimate


def test_without_pairs_there_is_no_interaction_and_no_necessity() -> None:
    singles = EvaluatedSets.of(planted_sets(SINGLE), draws=200)
    assert singles.interactions(["protect-one"]) == {}
    assert singles.necessity_tests([2]) == ()


def test_the_best_pair_is_tested_against_every_change_of_one_member() -> None:
    worst, mean = evaluated().necessity_tests([2])
    assert (worst.objective, mean.objective) == ("worst", "mean")
    assert worst.units == ("layers.0", "layers.2")
    assert worst.possible == 2 + 4
    assert {row.change for row in worst.changes} == {
        "layers.0", "layers.2", "layers.1 for layers.0", "layers.3 for layers.0",
        "layers.1 for layers.2", "layers.3 for layers.2",
    }  # fmt: skip
    assert all(row.necessary for row in worst.changes)


def test_a_member_that_does_nothing_is_not_necessary() -> None:
    units = ("layers.0", "layers.3")
    swept = planted_sets({("layers.0",): 1.0, ("layers.3",): 0.0, units: 1.0}, noise=0.001)
    (test, _) = EvaluatedSets.of(swept, draws=200).necessity_tests([2])
    assert test.units == units
    assert {row.change: row.necessary for row in test.changes} == {"layers.0": True, "layers.3": False}


@pytest.mark.parametrize("size", [2, 3])
def test_only_changes_that_were_evaluated_are_told(size: int) -> None:
    chosen = UNITS[:size]
    swept = planted_sets(SINGLE | {chosen: 2.0}, noise=0.001)
    test = EvaluatedSets.of(swept, draws=200).necessity_tests([size])[0]
    assert len(test.changes) == (2 if size == 2 else 0)
    assert test.possible == size + size * (len(UNITS) - size)
