from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Bootstrap, Interval, Ranking, SweepReport, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import OBJECTIVES, Objective
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.recommend import Limit, recommend_plan
from quant_fairness_plugin.statistics.ranking import rank_units
from quant_fairness_plugin.statistics.synergy import EvaluatedSets
from tests.planted import LANGUAGES, planted_report, planted_sets

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


def test_an_objective_that_is_registered_ranks_units_judges_sets_and_gets_an_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One entry is all that a new objective costs. Without protection the languages lose 4, 8 and 6 nats.

    The middle one loses 3.5 with layer 1 protected, 5 with 2, 5.9 with 0; the worst one 7.8, 6 and 7.9.
    """
    record = Objective(name="median", description="median KL", over=lambda figures: np.median(figures, axis=1))
    monkeypatch.setitem(OBJECTIVES, "median", record)
    gains = {"layers.0": (0.1, 0.1, 0.1), "layers.1": (2.0, 0.2, 2.5), "layers.2": (0.0, 3.0, 0.0)}
    report = planted_sets(
        {(unit,): dict(zip(LANGUAGES, gain, strict=True)) for unit, gain in gains.items()}
        | {("layers.1", "layers.2"): dict(zip(LANGUAGES, (2.0, 3.2, 2.5), strict=True))},
        noise=0.001,
    )
    by_median, by_worst = rank(report, "median", top=1), rank(report, "worst", top=1)
    assert isinstance(by_median, Ranking)
    assert isinstance(by_worst, Ranking)
    assert (by_median.objective, by_median.layers, by_median.stable) == ("median", (1, 2, 0), True)
    assert by_worst.layers == (2, 1, 0)
    value = report.rows[0].objectives["median"]
    assert isinstance(value, Interval)
    kl = sorted(row.kl_bits_per_byte.estimate for row in report.rows[0].damage)
    assert value.estimate == pytest.approx(kl[1], rel=1e-6)
    sets = EvaluatedSets.of(report, draws=200)
    assert "protect-one median" in sets.interactions(["protect-one"])
    assert [test.objective for test in sets.necessity_tests([2])] == ["worst", "mean", "median"]
    assert Search(method="greedy", objective="median").objective == "median"
    assert recommend_plan(report, objective="median", top=1, draws=200).protected_layers == (1,)
    with pytest.raises(ConfigError, match="'median' cannot be added up over units; use worst or mean"):
        recommend_plan(report, Limit(max_bytes=10**6), objective="median", draws=200)
