from __future__ import annotations

import pytest

from quant_fairness_plugin.artifacts import Bootstrap, Ranking, SweepReport, Undefined
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.statistics.ranking import rank_units
from tests.planted import planted_report

BENEFIT = [0.1, 0.4, 2.5, 0.2, 1.6, 0.3, 0.9, 0.05]
ORDER = (2, 4, 6, 1, 5, 3, 0, 7)


def rank(report: SweepReport, objective: str = "worst", top: int = 3) -> Ranking | Undefined:
    damage = {row.plan: row.damage for row in report.rows}
    return rank_units(
        report.scores,
        damage,
        units=report.units,
        mode="protect-one",
        objective=objective,
        top=top,
        bootstrap=Bootstrap(report.reference, 200),
    )


@pytest.mark.parametrize("objective", ["worst", "mean", "bpb"])
def test_layers_come_out_in_the_order_of_their_planted_benefit(objective: str) -> None:
    ranking = rank(planted_report(BENEFIT, noise=0.001), objective)
    assert isinstance(ranking, Ranking)
    assert ranking.layers == ORDER
    assert ranking.stable
    assert ranking.top_probability[:3] == (1.0, 1.0, 1.0)
    assert ranking.kendall_tau_halves == 1.0


def test_layers_without_any_effect_are_unstable() -> None:
    ranking = rank(planted_report([0.0] * 8, noise=0.3))
    assert isinstance(ranking, Ranking)
    assert not ranking.stable


def test_identical_plans_tie_and_are_unstable() -> None:
    report = planted_report([0.0] * 6)
    same = report.scores["protect 0"]
    scores = {name: (same if name.startswith("protect") else value) for name, value in report.scores.items()}
    damage = {row.plan: row.damage for row in report.rows}
    ranking = rank_units(
        scores,
        damage,
        units=report.units,
        mode="protect-one",
        objective="worst",
        top=2,
        bootstrap=Bootstrap("en", 200),
    )
    assert isinstance(ranking, Ranking)
    assert ranking.kendall_tau_halves is None
    assert not ranking.stable


def test_every_objective_is_ranked_or_undefined_with_a_reason() -> None:
    report = planted_report(BENEFIT, noise=0.001)
    for objective in OBJECTIVES:
        assert isinstance(rank(report, objective), Ranking)


def test_excess_without_a_reference_is_undefined() -> None:
    report = planted_report(BENEFIT)
    damage = {row.plan: row.damage for row in report.rows}
    ranking = rank_units(
        report.scores,
        damage,
        units=report.units,
        mode="protect-one",
        objective="excess",
        top=3,
        bootstrap=Bootstrap(None, 200),
    )
    assert isinstance(ranking, Undefined)
    assert "reference" in ranking.undefined
