from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Interval, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.statistics.pareto import pareto_frontier
from quant_fairness_plugin.statistics.series import Series

DRAWS = 200


def series(value: float, noise: float = 1e-6, seed: int = 0) -> Array:
    drawn: Array = value + noise * np.random.default_rng(seed).standard_normal(DRAWS + 1)
    drawn[0] = value
    return drawn


def test_dominated_plans_name_what_dominates_them() -> None:
    bytes_ = {"none": 100, "bad": 130, "good": 120, "best": 200, "trade": 120}
    worst: dict[str, Series] = {
        "none": series(1.0), "bad": series(0.7, seed=1), "good": series(0.5, seed=2), "best": series(0.1, seed=3),
        "trade": series(0.6, seed=4),
    }  # fmt: skip
    mean: dict[str, Series] = {
        "none": series(0.5), "bad": series(0.4, seed=5), "good": series(0.3, seed=6), "best": series(0.1, seed=7),
        "trade": series(0.2, seed=8),
    }  # fmt: skip
    frontier = pareto_frontier(bytes_, worst, mean)
    assert frontier.plans == ("none", "good", "trade", "best")
    assert [row.plan for row in frontier.rows] == ["none", "good", "trade", "bad", "best"]
    rows = {row.plan: row for row in frontier.rows}
    assert rows["bad"].dominated_by == ("good", "trade")
    assert rows["bad"].on_frontier_probability == 0.0
    assert rows["best"].on_frontier_probability == 1.0
    assert isinstance(rows["good"].worst, Interval)
    assert rows["good"].worst.estimate == 0.5


def test_the_frontier_is_that_of_comparing_every_two_plans() -> None:
    draw = np.random.default_rng(1)
    names = [f"p{i}" for i in range(40)]
    bytes_ = {name: int(draw.integers(1, 15)) for name in names}
    worst = {name: draw.integers(1, 9, DRAWS + 1).astype(float) for name in names}
    mean = {name: draw.integers(1, 9, DRAWS + 1).astype(float) for name in names}

    def dominated(name: str, at: int) -> list[str]:
        mine = (bytes_[name], worst[name][at], mean[name][at])
        others = {other: (bytes_[other], worst[other][at], mean[other][at]) for other in names}
        return [
            o
            for o, theirs in others.items()
            if theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True))
        ]

    for row in pareto_frontier(bytes_, dict(worst), dict(mean)).rows:
        assert sorted(row.dominated_by) == sorted(dominated(row.plan, 0))
        share = np.mean([not dominated(row.plan, at) for at in range(1, DRAWS + 1)])
        assert row.on_frontier_probability == pytest.approx(share)


def test_equal_plans_do_not_dominate_each_other() -> None:
    frontier = pareto_frontier({"a": 5, "b": 5}, {"a": series(1.0), "b": series(1.0)}, dict.fromkeys("ab", series(2.0)))
    assert frontier.plans == ("a", "b")
    assert all(row.on_frontier_probability == 1.0 for row in frontier.rows)


def test_a_collapsed_plan_is_on_no_frontier_and_dominates_nothing() -> None:
    lost = Undefined("collapsed in he")
    frontier = pareto_frontier({"a": 5, "b": 9}, {"a": lost, "b": series(1.0)}, {"a": lost, "b": series(1.0)})
    assert frontier.plans == ("b",)
    assert frontier.rows[0].worst == lost
    assert frontier.rows[0].on_frontier_probability is None
    assert not frontier.rows[0].on_frontier
    assert pareto_frontier({"a": 5}, {"a": lost}, {"a": lost}).plans == ()


def test_plans_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigError, match="plans b: give bytes, worst and mean harm"):
        pareto_frontier({"a": 5, "b": 6}, {"a": series(1.0)}, {"a": series(1.0)})
    with pytest.raises(ConfigError, match="plans missing"):
        pareto_frontier({}, {}, {})
    with pytest.raises(ConfigError, match="same resamples"):
        pareto_frontier({"a": 5}, {"a": series(1.0)}, {"a": series(1.0)[:-1]})
