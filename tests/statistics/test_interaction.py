from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Bootstrap, Interval, Number, SynergyMatrix, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import interval
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.statistics.series import plan_series
from quant_fairness_plugin.statistics.synergy import necessity, synergy_matrix
from tests.planted import LANGUAGES, state

DRAWS = 400


def series(value: float, noise: float = 0.001, seed: int = 0) -> Array:
    drawn: Array = value + noise * np.random.default_rng(seed).standard_normal(DRAWS + 1)
    drawn[0] = value
    return drawn


def estimate(number: Number) -> float:
    assert isinstance(number, Interval)
    return number.estimate


def planted(both: float, none: float = 1.0) -> SynergyMatrix:
    single = {"a": series(0.8, seed=1), "b": series(0.5, seed=2), "c": series(0.9, seed=3)}
    return synergy_matrix(series(none, seed=4), single, {("a", "b"): series(both, seed=5)})


def test_synergy_is_what_a_pair_gains_beyond_its_members() -> None:
    matrix = planted(0.2)
    cell = matrix.between("b", "a")
    assert cell is not None
    assert estimate(cell.gain) == pytest.approx(0.8)
    assert [estimate(gain) for gain in cell.gains_alone] == pytest.approx([0.2, 0.5])
    assert estimate(cell.additive) == pytest.approx(0.8 - 0.2 - 0.5)
    assert estimate(cell.multiplicative) == pytest.approx(0.2 * 1.0 / (0.8 * 0.5))
    assert cell.adjusted_p is not None
    assert cell.adjusted_p < 0.05
    assert matrix.between("a", "c") is None
    assert matrix.coverage == "1 of 3 pairs"


def test_the_two_definitions_agree_with_independence_in_their_own_terms() -> None:
    sum_of_gains = planted(0.3).pairs[0]
    product_of_factors = planted(0.4).pairs[0]
    assert isinstance(sum_of_gains.additive, Interval)
    assert sum_of_gains.additive.low < 0 < sum_of_gains.additive.high
    assert isinstance(product_of_factors.multiplicative, Interval)
    assert product_of_factors.multiplicative.low < 1 < product_of_factors.multiplicative.high
    assert isinstance(sum_of_gains.multiplicative, Interval)
    assert sum_of_gains.multiplicative.high < 1


def test_intervals_are_paired_over_the_resamples() -> None:
    shared = series(0.0, noise=0.2, seed=9)
    single = {"a": 0.8 + shared, "b": 0.5 + shared}
    cell = synergy_matrix(1.0 + shared, single, {("a", "b"): 0.2 + shared}).pairs[0]
    naive = (1.0 + shared - (0.2 + shared)) - (1.0 + shared - (0.8 + shared)) - (1.0 + shared - (0.5 + shared))
    assert isinstance(cell.additive, Interval)
    assert cell.additive.low == pytest.approx(interval(naive).low)
    assert cell.additive.high - cell.additive.low < 1e-9  # what all plans share cancels


@pytest.mark.parametrize("value", [0.0, 0.0005, -0.5])
@pytest.mark.parametrize("where", ["none", "a"])
def test_a_factor_of_nothing_is_undefined(value: float, where: str) -> None:
    none = series(value if where == "none" else 1.0, seed=4)
    single = {"a": series(value if where == "a" else 0.8, seed=1), "b": series(0.5, seed=2)}
    cell = synergy_matrix(none, single, {("a", "b"): series(0.2)}).pairs[0]
    assert isinstance(cell.multiplicative, Undefined)
    assert "not clearly above 0" in cell.multiplicative.undefined
    assert ("nothing protected" if where == "none" else "with a protected") in cell.multiplicative.undefined
    assert isinstance(cell.additive, Interval)


def test_two_factors_below_0_do_not_make_a_ratio() -> None:
    single = {"a": series(-0.8, seed=1), "b": series(-0.5, seed=2)}
    cell = synergy_matrix(series(1.0), single, {("a", "b"): series(0.2)}).pairs[0]
    assert isinstance(cell.multiplicative, Undefined)


def test_a_pair_that_loses_nothing_has_the_factor_0() -> None:
    assert estimate(planted(0.0).pairs[0].multiplicative) == 0.0


def test_a_plan_without_a_value_leaves_its_pairs_undefined() -> None:
    single = {"a": Undefined("collapsed"), "b": series(0.5), "c": series(0.5, seed=8)}
    matrix = synergy_matrix(series(1.0), single, {("a", "b"): series(0.2), ("b", "c"): series(0.1)})
    lost, kept = matrix.pairs
    assert lost.additive == lost.multiplicative == Undefined("collapsed")
    assert lost.adjusted_p is None
    assert isinstance(kept.additive, Interval)
    assert kept.adjusted_p is not None


def test_planted_sentences_give_the_planted_synergy() -> None:
    gains = {"none": 0.0, "a": 1.0, "b": 2.0, "both": 4.5}
    scores = {BASELINE: state(BASELINE, dict.fromkeys(LANGUAGES, 0.0))}
    scores |= {name: state(name, dict.fromkeys(LANGUAGES, 8.0 - gain), noise=0.01) for name, gain in gains.items()}
    found = plan_series(scores, gains, LANGUAGES, objective="mean", bootstrap=Bootstrap(None, DRAWS))
    cell = synergy_matrix(found["none"], {"a": found["a"], "b": found["b"]}, {("a", "b"): found["both"]}).pairs[0]
    assert estimate(cell.additive) == pytest.approx(1.5 / (80 * np.log(2)), rel=0.02)
    assert estimate(cell.multiplicative) == pytest.approx(3.5 * 8.0 / (7.0 * 6.0), rel=0.01)


def test_pairs_need_their_members_and_the_same_resamples() -> None:
    single = {"a": series(0.8)}
    with pytest.raises(ConfigError, match="no plan protects b alone"):
        synergy_matrix(series(1.0), single, {("a", "b"): series(0.2)})
    with pytest.raises(ConfigError, match="with itself"):
        synergy_matrix(series(1.0), single, {("a", "a"): series(0.2)})
    with pytest.raises(ConfigError, match="series of"):
        synergy_matrix(series(1.0)[:-1], single, {})


def test_a_member_is_necessary_where_dropping_it_clearly_hurts() -> None:
    changed = {"a": series(0.5, seed=1), "b": series(0.2002, seed=2), "c": series(0.1, seed=3), "d": Undefined("gone")}
    needed, idle, harmful, unknown = necessity(series(0.2), changed)
    assert needed.necessary
    assert estimate(needed.rise) == pytest.approx(0.3)
    assert not idle.necessary
    assert not harmful.necessary
    assert estimate(harmful.rise) < 0
    assert harmful.adjusted_p is not None
    assert harmful.adjusted_p < 0.05
    assert unknown.rise == Undefined("gone")
    assert not unknown.necessary


def test_necessity_is_adjusted_for_the_number_of_members() -> None:
    base = np.zeros(201)
    border = np.ones(201)
    border[1:5] = -1.0  # 4 of 200 draws: p = 2 · 5 / 201 = 0.0498
    noise = {f"n{i}": np.where(np.arange(201) % 2, -1.0, 1.0) for i in range(3)}
    assert necessity(base, {"a": border})[0].necessary
    assert not necessity(base, {"a": border} | noise)[0].necessary
