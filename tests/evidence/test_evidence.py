from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Evidence,
    Grid,
    Interval,
    Precision,
    ProtectionPlan,
    Standing,
    TextSet,
    Undefined,
    from_json,
    to_json,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.evidence import THE_PLAN, Rivals, gather_evidence
from quant_fairness_plugin.measure.damage import measure_damage
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.costs import count_bytes, layer_costs
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.recommend import explicit_plan
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.walk import score_plans
from tests.planted_model import IDLE_LAYER, LAYERS, PLANTED_LAYER, planted_texts

GRID = Grid(group_size=32)


@pytest.fixture(scope="module")
def loaded(planted_model: Path) -> LoadedModel:
    return load_model(str(planted_model))


def protecting(
    loaded: LoadedModel, *layers: int, grid: Grid = GRID, overrides: dict[str, Precision] | None = None
) -> ProtectionPlan:
    sizes, other = count_bytes(loaded, grid)
    return explicit_plan(
        layers, model="planted", grid=grid, layer_bytes=sizes, other_bytes=other, overrides=overrides or {}
    )


def gather(loaded: LoadedModel, plan: ProtectionPlan, rivals: dict[str, ProtectionPlan] | None = None) -> Evidence:
    texts = planted_texts()
    return gather_evidence(
        loaded,
        plan,
        texts.part("confirm"),
        rivals=Rivals(texts=texts.part("search"), plans=rivals or {}, random_plans=3),
        bootstrap=Bootstrap(None, 200),
    )


@pytest.fixture(scope="module")
def good(loaded: LoadedModel) -> Evidence:
    rivals = {"rival": protecting(loaded, overrides={f"layers.{PLANTED_LAYER}": "int8"})}
    return gather(loaded, protecting(loaded, PLANTED_LAYER), rivals)


def test_the_planted_layer_beats_nothing_at_all_and_every_other_layer(good: Evidence) -> None:
    assert isinstance(good.standing, Standing)
    # 0.09 bits per byte are left, of 1.37 and, with another layer, at least 1.35.
    assert (good.standing.random_plans, good.standing.percentile) == (LAYERS - 1, 100.0)
    outcomes = {row.control: row.outcome for row in good.comparisons}
    assert outcomes["none"] == "beaten"
    assert "the plan stands at percentile 100" in good.verdict
    # Three random layers cannot show that this is more than chance: p = 1/4.
    assert "NOT better than chance" in good.verdict


def test_an_idle_layer_is_said_not_to_help(loaded: LoadedModel) -> None:
    found = gather(loaded, protecting(loaded, IDLE_LAYER))
    outcomes = {row.control: row.outcome for row in found.comparisons}
    assert outcomes["none"] == "not beaten"
    assert "does NOT measurably beat none" in found.verdict
    assert isinstance(found.standing, Standing)
    assert found.standing.percentile < 50  # layer 2 saves 1.3 and layer 0 0.02 bits per byte; rounding moves 1e-7


def test_a_plan_of_fewer_bytes_that_is_better_is_named(good: Evidence) -> None:
    """More bits for everything cost less than one layer in 16 bit here: no equals, and yet compared."""
    own = good.row(THE_PLAN).bytes_
    cheaper = {row.name for row in good.rows if row.bytes_ < own and not row.matched and row.name != "none"}
    assert cheaper
    compared = {row.control: row.outcome for row in good.comparisons}
    assert cheaper <= compared.keys()
    assert "rival" in compared
    assert good.row("rival").precisions == {f"layers.{PLANTED_LAYER}": "int8"}


def test_every_plan_has_its_true_bytes_and_equal_ones_are_marked(good: Evidence, loaded: LoadedModel) -> None:
    sizes, other = count_bytes(loaded, GRID)
    expected = other + sum(sizes["quantized"]) + sizes["fp16"][PLANTED_LAYER] - sizes["quantized"][PLANTED_LAYER]
    assert good.row(THE_PLAN).bytes_ == expected
    assert good.row("none").bytes_ == other + sum(sizes["quantized"])
    assert all(row.bytes_ == expected for row in good.rows if row.name.startswith("random "))
    assert not good.row("none").matched


def test_figures_are_those_of_a_measurement_of_the_plan_alone(good: Evidence, loaded: LoadedModel) -> None:
    texts, units = planted_texts().part("confirm"), map_units(loaded)
    plan: dict[str, Precision] = {f"layers.{i}": "int4" for i in range(LAYERS) if i != PLANTED_LAYER}
    scores = score_plans(loaded, {"alone": plan}, texts, units=units, bank=RtnBank(loaded, units, GRID))
    damage = measure_damage(
        scores["16 bit"], scores["alone"], texts, vocabulary=loaded.model.config.vocab_size, bootstrap=Bootstrap(None)
    )
    worst = good.row(THE_PLAN).worst
    assert isinstance(worst, Interval)
    assert worst.estimate == pytest.approx(max(row.kl_bits_per_byte.estimate for row in damage), rel=1e-4)
    assert worst.low < worst.estimate < worst.high


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_uniform_controls_have_more_bits_than_the_grid(loaded: LoadedModel, bits: int) -> None:
    costs = layer_costs(loaded, replace(GRID, bits=bits))
    kinds = set(costs.bytes_["layers.0"])
    assert kinds == {f"int{b}" for b in (3, 4, 5, 8) if b > bits} | {f"int{bits}", "fp16"}


def test_controls_are_chosen_on_other_sentences(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def noted(model: LoadedModel, texts: TextSet, **rest: object) -> dict[str, tuple[float, ...]]:
        seen.append(texts.ids)
        return {}

    monkeypatch.setattr("quant_fairness_plugin.evidence.score_layers", noted)
    gather(loaded, protecting(loaded, PLANTED_LAYER))
    assert seen == [planted_texts().part("search").ids]
    assert not set(seen[0]) & set(planted_texts().part("confirm").ids)


def test_evidence_is_the_same_after_a_file(good: Evidence) -> None:
    assert from_json(Evidence, to_json(good), "test") == good


def test_a_plan_that_protects_nothing_has_nothing_to_compare(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="protects nothing"):
        gather(loaded, protecting(loaded))


def test_a_model_that_knows_no_language_is_refused(tiny_model: Callable[..., Path]) -> None:
    untrained = load_model(str(tiny_model("llama")))
    sizes, other = count_bytes(untrained, GRID)
    plan = explicit_plan((0,), model="tiny", grid=GRID, layer_bytes=sizes, other_bytes=other)
    with pytest.raises(QualityGateError, match="supports none"):
        gather(untrained, plan)


def test_a_plan_under_which_a_language_collapses_stands_nowhere(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(*given: object) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        return ("en", "he"), {THE_PLAN: ("he",)}

    monkeypatch.setattr("quant_fairness_plugin.evidence._statuses", collapsed)
    found = gather(loaded, protecting(loaded, PLANTED_LAYER))
    worst = found.row(THE_PLAN).worst
    assert isinstance(worst, Undefined)
    assert "collapsed in he" in worst.undefined
    assert found.standing == worst
    assert found.comparisons == ()
    assert isinstance(found.row("none").worst, Interval)
    assert THE_PLAN not in found.frontier.plans
    assert "collapsed in he" in found.verdict


def test_a_memory_budget_is_refused(loaded: LoadedModel) -> None:
    texts, plan = planted_texts(), protecting(loaded, PLANTED_LAYER)
    with pytest.raises(ConfigError, match="only a sweep goes layer by layer"):
        gather_evidence(
            loaded,
            plan,
            texts.part("confirm"),
            rivals=Rivals(texts=texts.part("search")),
            bootstrap=Bootstrap(None, 200),
            execution=Execution(memory_budget=10**9),
        )
