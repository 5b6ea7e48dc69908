from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from quant_fairness_plugin.artifacts import Interval, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.statistics.standing import compare_with, percentile_of, standing_of, verdict

DRAWS = 300


def series(value: float, noise: float = 0.01, seed: int = 0) -> Array:
    drawn: Array = value + noise * np.random.default_rng(seed).standard_normal(DRAWS + 1)
    drawn[0] = value
    return drawn


@pytest.mark.parametrize("worse", [0, 1, 13, 20])
def test_a_percentile_has_the_exact_binomial_interval_of_its_random_plans(worse: int) -> None:
    standing = percentile_of(1.0, [2.0] * worse + [0.5] * (20 - worse))
    exact = binomtest(worse, 20).proportion_ci(method="exact")
    assert standing.percentile == pytest.approx(100 * worse / 20)
    assert (standing.low, standing.high) == pytest.approx((100 * exact.low, 100 * exact.high), abs=1e-4)
    assert standing.p_value == pytest.approx((20 - worse + 1) / 21)
    assert standing.over_sentences is None


def test_ties_count_half_and_widen_the_interval() -> None:
    standing = percentile_of(1.0, [1.0, 1.0, 2.0, 0.5])
    assert standing.percentile == 50.0
    assert standing.low == pytest.approx(percentile_of(1.0, [0.0, 0.0, 2.0, 0.5]).low)
    assert standing.high == pytest.approx(percentile_of(1.0, [2.0, 2.0, 2.0, 0.5]).high)
    assert standing.p_value == pytest.approx(4 / 5)


def test_collapsed_random_plans_are_worse_than_any() -> None:
    standing = standing_of(series(1.0), {"random 0": Undefined("collapsed"), "random 1": series(0.5, seed=1)})
    assert not isinstance(standing, Undefined)
    assert standing.percentile == 50.0


def test_the_percentile_moves_with_the_sentences() -> None:
    others = {f"random {i}": series(1.0 + (i - 5) * 0.01, seed=i + 1) for i in range(11)}
    standing = standing_of(series(1.0), others)
    assert not isinstance(standing, Undefined)
    assert standing.percentile == pytest.approx(100 * 5.5 / 11)
    naive = [
        100 * np.mean([float(other[draw] > series(1.0)[draw]) for other in others.values()])
        for draw in range(1, DRAWS + 1)
    ]
    assert isinstance(standing.over_sentences, Interval)
    assert standing.over_sentences.low == pytest.approx(float(np.quantile(naive, 0.025)), rel=1e-5)
    assert standing.over_sentences.high == pytest.approx(float(np.quantile(naive, 0.975)), rel=1e-5)


def test_without_random_plans_there_is_no_standing() -> None:
    assert isinstance(standing_of(series(1.0), {}), Undefined)
    with pytest.raises(ConfigError, match="at least one random plan"):
        percentile_of(1.0, [])
    with pytest.raises(ConfigError, match="give a finite value"):
        percentile_of(float("inf"), [1.0])


def test_the_verdict_names_what_is_beaten_and_what_is_not() -> None:
    plan = series(1.0)
    controls = {
        "first": series(2.0, seed=1),
        "kurtosis": series(1.0001, seed=2),
        "uniform int8": series(0.5, seed=3),
        "last": Undefined("collapsed"),
    }
    rows = compare_with(plan, controls)
    assert [row.outcome for row in rows] == ["beaten", "not beaten", "better", "undefined"]
    assert isinstance(rows[0].difference, Interval)
    assert rows[0].difference.estimate == pytest.approx(1.0)
    standing = standing_of(plan, {f"random {i}": series(3.0, seed=i) for i in range(20)})
    said = verdict("layers 0, 3", standing, rows)
    assert said == (
        "layers 0, 3 stands at percentile 100 [83, 100] of 20 random plans at equal bytes (p = 0.048), better than "
        "chance; it is worse than uniform int8; it does NOT measurably beat kurtosis; it beats first; it cannot be "
        "compared with last"
    )


def test_a_plan_among_the_random_ones_is_said_not_to_beat_chance() -> None:
    standing = standing_of(series(1.0), {f"random {i}": series(0.9 + 0.02 * i, seed=i) for i in range(12)})
    assert "NOT better than chance" in verdict("auto", standing, ())
    assert "no random plan" in verdict("auto", standing_of(series(1.0), {}), ())


def test_identical_plans_do_not_beat_each_other() -> None:
    plan = series(1.0)
    row = compare_with(plan, {"first": plan.copy()})[0]
    assert row.outcome == "not beaten"
    assert row.adjusted_p == 1.0


def test_comparisons_are_adjusted_for_their_number() -> None:
    border = np.ones(201)
    border[1:5] = -1.0  # 4 of 200 draws: p = 2 · 5 / 201 = 0.0498
    noise = {f"n{i}": np.where(np.arange(201) % 2, -1.0, 1.0) for i in range(3)}
    assert compare_with(np.zeros(201), {"a": border})[0].outcome == "beaten"
    assert compare_with(np.zeros(201), {"a": border} | noise)[0].outcome == "not beaten"
