from __future__ import annotations

import pytest

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.recommend import explicit_plan, recommend_plan
from tests.planted import planted_report

BENEFIT = [0.1, 0.4, 2.5, 0.2, 1.6, 0.3, 0.9, 0.05]
# 8 layers of 1000 or 260 bytes and 500 others: all quantized is 2580, each protected layer adds 740 (28.7 %).
FLOOR, STEP = 2580, 740


def test_top_gives_that_many_layers_in_ascending_order() -> None:
    plan = recommend_plan(planted_report(BENEFIT, noise=0.001), top=3, draws=200)
    assert plan.protected_layers == (2, 4, 6)
    assert plan.stable
    assert plan.predicted
    assert plan.extra_bytes == 3 * STEP
    assert plan.overhead == pytest.approx(3 * STEP / FLOOR, abs=1e-6)
    assert plan.units["layers.2"] == "fp16"
    assert plan.units["layers.0"] == "int4"


def test_top_is_honoured_when_the_ranking_is_unstable_and_says_so() -> None:
    plan = recommend_plan(planted_report([0.0] * 8, noise=0.3), top=3, draws=200)
    assert len(plan.protected_layers) == 3
    assert not plan.stable


@pytest.mark.parametrize(("budget", "layers"), [(0.28, 0), (0.29, 1), (0.58, 2), (1.0, 3)])
def test_auto_protects_as_many_layers_as_the_budget_pays(budget: float, layers: int) -> None:
    plan = recommend_plan(planted_report(BENEFIT, noise=0.001), max_overhead=budget, draws=200)
    assert len(plan.protected_layers) == layers
    assert plan.overhead <= budget


def test_auto_protects_nothing_when_the_ranking_is_unstable() -> None:
    plan = recommend_plan(planted_report([0.0] * 8, noise=0.3), max_overhead=1.0, draws=200)
    assert plan.protected_layers == ()
    assert "unstable" in plan.reasons[0]


def test_strict_turns_an_unstable_ranking_into_an_error() -> None:
    with pytest.raises(QualityGateError, match="unstable"):
        recommend_plan(planted_report([0.0] * 8, noise=0.3), top=3, strict=True, draws=200)


@pytest.mark.parametrize("top", [0, -1, 8])
def test_top_out_of_range_is_an_error(top: int) -> None:
    with pytest.raises(ConfigError, match="use 1..7"):
        recommend_plan(planted_report(BENEFIT), top=top)


def test_an_explicit_plan_counts_its_bytes() -> None:
    sizes = {"fp16": (1000, 1000), "quantized": (260, 260)}
    plan = explicit_plan((1,), model="m", grid=Grid(bits=3), layer_bytes=sizes, other_bytes=480)
    assert plan.extra_bytes == 740
    assert plan.overhead == pytest.approx(0.74)
    assert plan.units == {"layers.0": "int3", "layers.1": "fp16"}
