"""Planted layers: the same function of relative depth is alike, its reverse is not, chance is neither."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from quant_fairness_plugin.analysis.correlations import kendall, kendall_p
from quant_fairness_plugin.analysis.depth import Depths, at_depths, compare, verdict
from quant_fairness_plugin.analysis.kinds import find_analysis
from quant_fairness_plugin.analysis.request import AnalysisOptions, SavedRequest, parse_sweeps
from quant_fairness_plugin.artifacts import Interval, Mode, StateScores, SweepReport, Undefined, save
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE, plan_name
from tests.planted import SENTENCES, planted_report

LEVEL = 10.0
"""KL in nats a sentence, which protecting a layer lowers by what it is worth."""


def swept(
    worth: list[float], name: str, *, noise: float = 0.0, seed: int = 0, mode: Mode = "protect-one", texts: str = "t"
) -> SweepReport:
    """A sweep of layers that are worth so much in every language, with noise of its own in every sentence."""
    draw, sign = np.random.default_rng(seed), -1.0 if mode == "protect-one" else 1.0
    report = planted_report([1.0] * len(worth))
    base = report.scores[BASELINE]
    scores = {name: report.scores[name] for name in (BASELINE, NONE)}
    for layer, value in enumerate(worth):
        plan = plan_name(mode, [f"layers.{layer}"])
        level = LEVEL + sign * value
        rows = {
            tag: replace(row, kl_nats=tuple((level + noise * draw.standard_normal(SENTENCES)).tolist()))
            for tag, row in base.languages.items()
        }
        scores[plan] = StateScores(state=plan, languages=rows)
    rows = [replace(row, mode=mode, plan=plan_name(mode, row.units)) if row.mode else row for row in report.rows]
    known = replace(report.provenance, model=name, text_sha256=texts)
    return replace(report, provenance=known, rows=tuple(rows), scores=scores)


def ask(folder: Path, *reports: SweepReport, languages: tuple[str, ...] | None = None) -> Depths:
    paths = [folder / f"{place}.json" for place in range(len(reports))]
    for report, path in zip(reports, paths, strict=True):
        save(report, path)
    config = FairConfig(draws=200, languages=languages)
    result = find_analysis("depth").run(SavedRequest(config=config, options=AnalysisOptions(sweep=tuple(paths))))
    assert isinstance(result, Depths)
    return result


def curve(layers: int, sign: float = 1.0) -> list[float]:
    """A valley, whose two sides differ."""
    return [sign * (layer / (layers - 1) - 0.55) ** 2 for layer in range(layers)]


def test_the_same_function_of_relative_depth_is_alike_and_its_reverse_is_not(tmp_path: Path) -> None:
    found = ask(tmp_path, swept(curve(12), "deep"), swept(curve(6), "flat"), swept(curve(6, -1.0), "turned"))
    alike, turned, _ = found.pairs
    assert (alike.first, alike.second, alike.mode, alike.depths, alike.paired) == (
        "deep",
        "flat",
        "protect-one",
        6,
        True,
    )
    assert (alike.tau, alike.verdict) == (Interval(1.0, 1.0, 1.0), "alike")
    assert (turned.tau, turned.verdict) == (Interval(-1.0, -1.0, -1.0), "not alike")
    # One order of 720 agrees as well, and all agree as well as the reverse; three pairs are tested.
    raw = [1 / 720, 1.0, 1.0]
    assert [row.adjusted_p for row in found.pairs] == pytest.approx(stats.false_discovery_control(raw))
    assert (found.objective, found.languages) == ("worst", ("en", "he", "zh"))


def test_noise_leaves_an_interval_around_zero(tmp_path: Path) -> None:
    values = np.random.default_rng(5).uniform(0.0, 0.1, (2, 12)).tolist()
    first, second = (swept(row, f"m{i}", noise=1.0, seed=i, texts=f"t{i}") for i, row in enumerate(values))
    (row,) = ask(tmp_path, first, second).pairs
    assert isinstance(row.tau, Interval)
    assert row.tau.low < 0 < row.tau.high
    assert (row.paired, row.verdict) == (False, "undecided")


def test_orders_that_agree_by_chance_are_not_called_alike(tmp_path: Path) -> None:
    first, second = swept([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "a"), swept([3.0, 1.0, 2.0, 6.0, 5.0, 4.0], "b")
    (row,) = ask(tmp_path, first, second).pairs
    assert isinstance(row.tau, Interval)
    assert (row.tau.low, row.verdict) == (pytest.approx(1 / 3), "undecided")
    assert isinstance(row.adjusted_p, float)
    assert row.adjusted_p > 0.05


def test_the_verdict_is_a_rule() -> None:
    above = Interval(0.5, 0.1, 0.9)
    assert verdict(above, 0.049) == "alike"
    assert verdict(above, 0.05) == "undecided"
    assert verdict(above, Undefined("ties")) == "undecided"
    assert verdict(Interval(0.5, 0.0, 0.9), 0.01) == "undecided"
    assert verdict(Interval(-0.5, -0.9, 0.0), 0.9) == "not alike"
    assert verdict(Interval(-0.5, -0.9, 0.1), 0.9) == "undecided"
    assert verdict(Undefined("flat"), 0.01) == "undecided"


def test_the_same_sentences_are_resampled_together(tmp_path: Path) -> None:
    noisy = swept(curve(8), "m", noise=0.5, seed=3)
    other = replace(noisy, provenance=replace(noisy.provenance, text_sha256="u"))
    together, apart, _ = ask(tmp_path, noisy, noisy, other).pairs
    assert (together.tau, together.paired) == (Interval(1.0, 1.0, 1.0), True)
    assert (together.first, together.second) == ("0.json", "1.json")  # of one model: the files tell them apart
    assert isinstance(apart.tau, Interval)
    assert (apart.tau.low < 0.9, apart.paired) == (True, False)


def test_the_two_modes_say_the_same_of_the_same_layers(tmp_path: Path) -> None:
    found = ask(tmp_path, *(swept(curve(12), name, mode="quantize-one") for name in "ab"))
    assert [(row.mode, row.verdict) for row in found.pairs] == [("quantize-one", "alike")]
    assert found.gateways[0].among_first == (1.0, 0.0, 1.0)


def test_gateway_layers_are_counted_among_the_first(tmp_path: Path) -> None:
    planted, other = [0.1 * layer for layer in range(12)], [0.1 * layer for layer in range(8)]
    for layer in (0, 9, 11):
        planted[layer] += 5.0
    first, second = ask(tmp_path, swept(planted, "a"), swept(other, "b")).gateways
    assert (first.gateways, first.among_first, first.all_first) == ((0, 9, 11), (1.0, 1.0, 1.0), 1.0)
    assert (second.gateways, second.among_first, second.all_first) == ((0, 6, 7), (0.0, 1.0, 1.0), 0.0)
    assert (first.all_by_chance, second.all_by_chance) == (pytest.approx(1 / 220), pytest.approx(1 / 56))


def test_a_plan_that_collapsed_leaves_nothing_to_compare(tmp_path: Path) -> None:
    good, bad = swept(curve(6), "good"), swept(curve(6), "bad")
    lost = replace(bad.rows[2], damage=tuple(replace(row, status="collapsed") for row in bad.rows[2].damage))
    found = ask(tmp_path, good, replace(bad, rows=(*bad.rows[:2], lost, *bad.rows[3:])))
    (row,) = found.pairs
    assert row.tau == row.adjusted_p == Undefined("'protect 1' collapsed in en, he, zh")
    assert row.verdict == "undecided"
    assert found.gateways[0].all_first == 0.0
    assert isinstance(found.gateways[1].among_first, Undefined)


def test_flat_layers_and_ties_have_no_figure() -> None:
    rising, flat = np.arange(5.0)[None].repeat(3, axis=0), np.ones((3, 5))
    tau, p = compare(rising, flat, 5)
    assert isinstance(tau, Undefined)
    assert isinstance(p, Undefined)
    assert isinstance(compare(flat, Undefined("lost"), 5)[0], Undefined)
    assert isinstance(kendall_p(np.array([1.0, 1.0, 2.0]), np.arange(3.0)), Undefined)


def naive_tau(first: list[float], second: list[float]) -> float:
    """τ-b by its definition, pair by pair."""
    agreeing = [0, 0, 0]
    for i in range(len(first)):
        for j in range(i):
            one, two = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
            agreeing[0] += int(one * two)
            agreeing[1] += int(one != 0)
            agreeing[2] += int(two != 0)
    return agreeing[0] / sqrt(agreeing[1] * agreeing[2])


def naive_depths(values: list[float], depths: int) -> list[float]:
    """Each depth between the two layers around it."""
    found = []
    for place in range(depths):
        depth, layers = place / (depths - 1), len(values)
        below = max(layer for layer in range(layers - 1) if layer / (layers - 1) <= depth)
        share = depth * (layers - 1) - below
        found.append((1 - share) * values[below] + share * values[below + 1])
    return found


@pytest.mark.parametrize(("layers", "depths"), [(12, 6), (30, 12), (7, 7), (5, 4)])
def test_depths_and_tau_are_the_naive_ones(layers: int, depths: int) -> None:
    draw = np.random.default_rng(layers)
    values: Array = draw.standard_normal((20, layers))
    found = at_depths(values, depths)
    assert found == pytest.approx(np.array([naive_depths(row.tolist(), depths) for row in values]))
    with_ties = draw.integers(0, 4, (20, depths)).astype(float)
    taus = kendall(found, with_ties)
    for one, two, tau in zip(found.tolist(), with_ties.tolist(), taus, strict=True):
        assert tau == pytest.approx(naive_tau(one, two))
        assert tau == pytest.approx(stats.kendalltau(one, two).statistic)


def test_the_p_value_counts_all_orders() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 3.0, 5.0, 4.0])
    observed = naive_tau(first.tolist(), second.tolist())
    as_high = [naive_tau(first.tolist(), list(order)) >= observed - 1e-12 for order in permutations(second.tolist())]
    assert kendall_p(first, second) == pytest.approx(np.mean(as_high))


def found_alike(first: Array, second: Array) -> float:
    """Share of rows whose order at six depths agrees with p below 0.05."""
    rows = zip(at_depths(first, 6), at_depths(second, 6), strict=True)
    return float(np.mean(np.array([kendall_p(one, two) for one, two in rows]) < 0.05))


def test_the_p_value_holds_unless_neighbours_are_alike_in_both_models() -> None:
    draw = np.random.default_rng(2)
    deep, shallow = draw.standard_normal((1000, 12)), draw.standard_normal((1000, 6))
    # Exact: at most 5 % of unrelated orders, here 28 of 720; three standard errors of 1,000 rows are 0.02.
    assert found_alike(deep, shallow) < 0.06
    assert found_alike(deep.cumsum(axis=1), shallow) < 0.06
    assert found_alike(deep.cumsum(axis=1), shallow.cumsum(axis=1)) > 0.06


def test_sweeps_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    good = swept(curve(6), "good")
    with pytest.raises(ConfigError, match=r"1 sweep\(s\) given, and two or more are compared; write --sweep"):
        ask(tmp_path, good)
    with pytest.raises(ConfigError, match=r"1\.json is a sweep of single units; expected whole layers\. Sweep with"):
        ask(tmp_path, good, planted_report([1.0] * 8, groups=("qkv", "down")))
    with pytest.raises(ConfigError, match=r"1\.json: 3 layers; 4 or more can be told from chance\. Leave it out"):
        ask(tmp_path, good, swept(curve(3), "small"))
    with pytest.raises(ConfigError, match="no mode in common: good has protect-one; other has quantize-one"):
        ask(tmp_path, good, swept(curve(6), "other", mode="quantize-one"))
    weak = replace(good, languages=dict.fromkeys(good.languages, "unsupported"))
    with pytest.raises(ConfigError, match=r"no supported language in common: 0\.json has en, he, zh; 1\.json has none"):
        ask(tmp_path, good, weak)
    with pytest.raises(ConfigError, match="fr: not in all sweeps; these have en, he, zh. Change --langs"):
        ask(tmp_path, good, good, languages=("en", "fr"))
    with pytest.raises(ConfigError, match="holds an empty name"):
        parse_sweeps("a.json,")


def test_only_languages_of_all_models_count(tmp_path: Path) -> None:
    good = swept(curve(6), "good")
    less = replace(good, languages=good.languages | {"he": "unsupported"})
    assert ask(tmp_path, good, less).languages == ("en", "zh")
    assert ask(tmp_path, good, less, languages=("zh", "en")).languages == ("zh", "en")
