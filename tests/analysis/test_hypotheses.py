"""Planted associations come out as claimed, chance does not, and what few languages can tell is said."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from quant_fairness_plugin.analysis.correlations import detectable_rho, over_items, partial, permutation_p, spearman
from quant_fairness_plugin.analysis.hypotheses import CLAIMS, Hypotheses, LanguageFigures, analyse, claim, verdict
from quant_fairness_plugin.artifacts import Interval, Undefined
from quant_fairness_plugin.model.load import LoadedModel
from tests.analysis.samples import request_of

X = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0]
Y = [2.0, 7.0, 1.0, 8.0, 2.5, 8.5, 3.0]
Z = [1.0, 6.0, 1.2, 8.0, 0.3, 3.0, 9.0]


def test_correlations_are_scipys() -> None:
    assert spearman(X, Y) == pytest.approx(stats.spearmanr(X, Y).statistic)
    ranks = np.column_stack([stats.rankdata(values) for values in (X, Y, Z)])
    rest = [ranks[:, i] - np.polyval(np.polyfit(ranks[:, 2], ranks[:, i], 1), ranks[:, 2]) for i in (0, 1)]
    assert partial(X, Y, Z) == pytest.approx(np.corrcoef(*rest)[0, 1])
    assert isinstance(spearman(X, [1.0] * 7), Undefined)
    assert isinstance(partial(X, Y, X), Undefined)


def test_permutations_come_to_the_exact_p_value() -> None:
    x, y = X[:6], Y[:6]
    observed = abs(stats.spearmanr(x, y).statistic)
    every = [abs(stats.spearmanr(x, order).statistic) >= observed - 1e-12 for order in permutations(y)]
    # 10,000 draws: a standard error of at most 0.005
    assert permutation_p(x, y, seed=0) == pytest.approx(np.mean(every), abs=0.02)


def test_few_items_leave_a_wide_interval() -> None:
    found = over_items(0.5, 12)
    assert isinstance(found, Interval)
    reach = 1.959964 * np.sqrt((1 + 0.125) / 9)
    assert [found.low, found.high] == pytest.approx([np.tanh(np.arctanh(0.5) + sign * reach) for sign in (-1, 1)])
    assert isinstance(over_items(0.5, 3), Undefined)
    few, many = detectable_rho(14), detectable_rho(100)
    assert isinstance(few, float)
    assert isinstance(many, float)
    assert 0.6 < few < 0.75
    assert many < 0.3


def rows(values: list[float], damage: list[float]) -> list[LanguageFigures]:
    families = ["a", "a", "b", "c", "d", "e", "f"] * 6
    return [
        LanguageFigures(str(i), families[i], kl, 1.0 + i % 3, {"figure": value})
        for i, (value, kl) in enumerate(zip(values, damage, strict=True))
    ]


def test_a_planted_association_is_supported_and_chance_is_not() -> None:
    damage = [float(i) for i in range(40)]
    good = claim("figure", 1, rows([2 * kl for kl in damage], damage), seed=0)
    assert (good.verdict, good.languages) == ("supported", 40)
    assert good.without_a_family == (1.0, 1.0)
    noise = np.random.default_rng(4).standard_normal(40).tolist()
    assert claim("figure", 1, rows(noise, damage), seed=0).verdict == "not supported"
    assert claim("figure", -1, rows([2 * kl for kl in damage], damage), seed=0).verdict == "not supported"
    few = claim("figure", 1, rows(X, Y), seed=0)
    assert few.verdict == "undecided"
    assert isinstance(claim("figure", 1, [], seed=0).rho, Undefined)


def test_a_family_that_makes_the_association_alone_is_seen() -> None:
    # Family "a" (every seventh item and the one after it) lies far out on both sides; the rest runs the other way.
    values = [50.0 if i % 7 < 2 else float(i) for i in range(14)]
    damage = [60.0 + i if i % 7 < 2 else -float(i) for i in range(14)]
    found = claim("figure", 1, rows(values, damage), seed=0)
    assert found.without_a_family[0] == -1.0
    assert isinstance(found.rho, Interval)
    assert found.rho.estimate > -0.5


def test_a_verdict_needs_the_whole_interval() -> None:
    assert verdict(Interval(2.0, 1.6, 2.5), 1.5, 1) == "supported"
    assert verdict(Interval(2.0, 1.4, 2.5), 1.5, 1) == "undecided"
    assert verdict(Interval(1.0, 0.8, 1.2), 1.5, 1) == "not supported"
    assert verdict(Interval(-0.9, -0.95, -0.8), 0.7, -1) == "supported"
    assert verdict(Undefined("nothing"), 1.5, 1) == "undecided"


def test_every_claim_is_asked_of_a_model(load: Callable[..., LoadedModel]) -> None:
    result = analyse(request_of(load("llama", layers=2)))
    assert isinstance(result, Hypotheses)
    assert [row.figure for row in result.claims] == list(CLAIMS)
    assert isinstance(result.low_over_high, Interval | Undefined)
    assert {row.verdict for row in result.claims} == {"undecided"}  # two languages can decide nothing
