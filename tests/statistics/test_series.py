from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Bootstrap, StateScores, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.statistics.series import Series, adjusted_p_values, check_lengths, plan_series
from tests.planted import LANGUAGES, SENTENCES, state

HUNDRED = Bootstrap(None, 100)


def scores() -> dict[str, StateScores]:
    return {
        BASELINE: state(BASELINE, dict.fromkeys(LANGUAGES, 0.0)),
        "a": state("a", {"en": 1.0, "he": 3.0, "zh": 2.0}, seed=5),
        "b": state("b", {"en": 2.0, "he": 1.0, "zh": 1.0}, seed=6),
    }


def worst_by_hand(given: StateScores, counts: np.ndarray) -> float:
    return max(
        float(np.dot(counts, rows.kl_nats) / np.dot(counts, rows.bytes_) / np.log(2))
        for rows in given.languages.values()
    )


def test_every_plan_is_judged_on_the_same_resamples() -> None:
    given = scores()
    found = plan_series(given, ["a", "b"], LANGUAGES, objective="worst", bootstrap=Bootstrap(None, 100, 3))
    counts = Resamples(SENTENCES, 100, 3).counts
    for plan in ("a", "b"):
        series = found[plan]
        assert not isinstance(series, Undefined)
        assert series[0] == pytest.approx(worst_by_hand(given[plan], np.ones(SENTENCES)))
        assert series[1:] == pytest.approx([worst_by_hand(given[plan], row) for row in counts])


def test_a_collapsed_plan_has_no_value() -> None:
    found = plan_series(scores(), ["a", "b"], LANGUAGES, objective="mean", bootstrap=HUNDRED, collapsed={"b": ("he",)})
    assert found["b"] == Undefined("'b' collapsed in he")
    assert not isinstance(found["a"], Undefined)


def test_a_disparity_without_a_hurt_reference_has_no_value() -> None:
    given = scores() | {"a": state("a", {"en": 0.0, "he": 3.0, "zh": 2.0})}
    found = plan_series(given, ["a"], LANGUAGES, objective="disparity", bootstrap=Bootstrap("en", 100))
    assert isinstance(found["a"], Undefined)


def test_plans_without_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'c' was not scored; there are 16 bit, a, b"):
        plan_series(scores(), ["c"], LANGUAGES, objective="worst", bootstrap=HUNDRED)
    with pytest.raises(ConfigError, match="no scores of the '16 bit' state"):
        plan_series({"a": scores()["a"]}, ["a"], LANGUAGES, objective="worst", bootstrap=HUNDRED)


def test_p_values_are_adjusted_over_the_series_that_have_one() -> None:
    clear = np.full(200, 1.0)
    noise = np.random.default_rng(0).normal(size=200)
    series: dict[str, Series] = {"clear": clear, "noise": noise, "none": Undefined("lost")}
    found = adjusted_p_values(series)
    assert set(found) == {"clear", "noise"}
    assert found["clear"] == pytest.approx(2 * 2 / 200)  # 2 · 1/200, times two values
    assert found["noise"] > 0.3
    assert adjusted_p_values({"none": Undefined("lost")}) == {}


def test_series_of_other_resamples_are_refused() -> None:
    check_lengths([np.zeros(5), Undefined("lost"), np.ones(5)])
    with pytest.raises(ConfigError, match="series of 5, 6 values"):
        check_lengths([np.zeros(5), np.zeros(6)])
    with pytest.raises(ConfigError, match="series of 1 values"):
        check_lengths([np.zeros(1)])
