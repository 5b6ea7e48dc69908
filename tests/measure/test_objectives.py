from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Bootstrap, Interval, Ranking, SweepReport
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import OBJECTIVES, Objective, find_objective, one_of
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.recommend import Limit, recommend_plan
from quant_fairness_plugin.statistics.ranking import rank_units
from quant_fairness_plugin.statistics.synergy import EvaluatedSets
from tests.planted import LANGUAGES, planted_sets

MEDIAN = Objective(name="median", description="median KL", over=lambda figures: np.median(figures, axis=1))
TOTAL = Objective(
    name="total",
    description="sum of the KLs",
    over=lambda figures: figures.sum(axis=1),
    sums=lambda importance: importance[None],
)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two new objectives, an entry each; all else in this file follows from them."""
    monkeypatch.setitem(OBJECTIVES, "median", MEDIAN)
    monkeypatch.setitem(OBJECTIVES, "total", TOTAL)


def planted() -> SweepReport:
    """Without protection the three languages lose 4, 8 and 6 nats a sentence.

    The middle one loses 3.5 with layer 1 protected, 5 with 2, 5.9 with 0; the worst one 7.8, 6 and 7.9.
    """
    gains = {
        ("layers.0",): (0.1, 0.1, 0.1),
        ("layers.1",): (2.0, 0.2, 2.5),
        ("layers.2",): (0.0, 3.0, 0.0),
        ("layers.1", "layers.2"): (2.0, 3.2, 2.5),
    }
    return planted_sets({units: dict(zip(LANGUAGES, gain, strict=True)) for units, gain in gains.items()}, noise=0.001)


def order(report: SweepReport, objective: str) -> tuple[int, ...]:
    ranking = rank_units(
        report.scores,
        {row.plan: row.damage for row in report.rows},
        units=report.units,
        mode="protect-one",
        objective=objective,
        top=1,
        bootstrap=Bootstrap("en", 200),
    )
    assert isinstance(ranking, Ranking)
    assert ranking.stable
    return ranking.layers


@pytest.mark.usefixtures("toys")
def test_a_registered_objective_is_measured_and_ranks_units() -> None:
    report = planted()
    assert order(report, "median") == (1, 2, 0)
    assert order(report, "worst") == (2, 1, 0)
    value = report.rows[0].objectives["median"]
    assert isinstance(value, Interval)
    kl = sorted(row.kl_bits_per_byte.estimate for row in report.rows[0].damage)
    assert value.estimate == pytest.approx(kl[1], rel=1e-6)


@pytest.mark.usefixtures("toys")
def test_a_registered_objective_judges_sets_and_is_accepted_by_search_and_configuration() -> None:
    sets = EvaluatedSets.of(planted(), draws=200)
    assert {"protect-one median", "protect-one total"} <= sets.interactions(["protect-one"]).keys()
    assert [test.objective for test in sets.necessity_tests([2])] == ["worst", "mean", "median", "total"]
    assert Search(method="greedy", objective="median").objective == "median"
    assert make_config(objective="median").objective == "median"


@pytest.mark.usefixtures("toys")
def test_a_registered_objective_is_allocated_for_if_it_adds_up_and_ranked_if_not() -> None:
    report = planted()
    one_layer = Limit(max_bytes=500 + 3 * 260 + 740)
    # Over all languages, layer 1 takes off 4.7 nats, 2 takes 3: the sum and the mean agree, the worst does not.
    chosen = {name: recommend_plan(report, one_layer, objective=name, draws=200) for name in ("total", "mean", "worst")}
    layers = {name: plan.protected_layers for name, plan in chosen.items()}
    assert layers == {"total": (1,), "mean": (1,), "worst": (2,)}
    assert recommend_plan(report, objective="median", top=1, draws=200).protected_layers == (1,)
    with pytest.raises(ConfigError, match="'median' cannot be added up over units; use worst, mean or total"):
        recommend_plan(report, one_layer, objective="median", draws=200)


@pytest.mark.parametrize("name", [name for name, record in OBJECTIVES.items() if record.adds_up])
def test_sums_of_equally_important_languages_are_the_objective_itself(name: str) -> None:
    record = find_objective(name)
    assert record.sums is not None
    kl = np.random.default_rng(0).gamma(1.0, 1.0, size=(50, 5))
    assert (record.sums(np.ones(5)) @ kl.T).max(axis=0) == pytest.approx(record.over(kl))


def test_only_what_is_made_of_kl_alone_judges_sets_and_only_a_ratio_has_no_unit() -> None:
    assert [name for name, record in OBJECTIVES.items() if record.judges_sets] == ["worst", "mean"]
    assert [name for name, record in OBJECTIVES.items() if record.needs_reference] == ["excess", "disparity"]
    assert [name for name, record in OBJECTIVES.items() if record.unit != "bits per byte"] == ["disparity"]
    assert all(record.description for record in OBJECTIVES.values())


def test_alternatives_are_written_as_a_sentence_has_them() -> None:
    assert [one_of(["a"]), one_of(["a", "b"]), one_of(["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
