from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import (
    Grid,
    LanguageScores,
    Precision,
    Provenance,
    StateScores,
    UnitScores,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.recommend.allocation import Limit
from quant_fairness_plugin.recommend.estimated import Demand, Planner, describe_choice

UNITS = ("layers.0.qkv", "layers.0.down", "layers.1.qkv", "layers.1.down")
SIZES = {"qkv": 40, "down": 64}
MENU: tuple[Precision, ...] = ("fp16", "int8")
OTHER = 1000
SENTENCES = 6


def unit_scores(seed: int = 0) -> UnitScores:
    draw = np.random.default_rng(seed)
    kl: dict[str, Any] = {}
    for unit in UNITS:
        nats = {language: draw.gamma(1.0, 2.0) * draw.uniform(0.9, 1.1, SENTENCES) for language in ("en", "he")}
        kl[unit] = {
            "int4": {language: tuple(values) for language, values in nats.items()},
            "int8": {language: tuple(values / 300) for language, values in nats.items()},
        }
    table = {
        f"{kind}.{group}": (size * bits // 4,) * 2
        for kind, bits in (("quantized", 4), ("int8", 8), ("fp16", 16))
        for group, size in SIZES.items()
    }
    table |= {
        kind: tuple(np.sum([table[f"{kind}.{g}"] for g in SIZES], axis=0)) for kind in ("quantized", "int8", "fp16")
    }
    return UnitScores(
        provenance=Provenance(
            versions={}, model="m", model_sha256="", text_set="t", text_sha256="", arguments={}, seed=0
        ),
        layers=2, grid=Grid(group_size=32), precisions=("int4", "int8"), errors="rtn", draws=2,
        languages={"en": "supported", "he": "supported", "xx": "unsupported"},
        bytes_={"en": (100,) * SENTENCES, "he": (50,) * SENTENCES},
        kl_nats=kl, layer_bytes=table, other_bytes=OTHER,
    )  # fmt: skip


def by_hand(scores: UnitScores, choice: dict[str, str]) -> tuple[int, dict[str, float]]:
    """Bytes and KL per language of a choice, added up."""
    total, kl = OTHER, {}
    for unit in UNITS:
        kind = choice.get(unit, "int4")
        group = unit.rsplit(".", 1)[1]
        total += SIZES[group] * {"int4": 1, "int8": 2, "fp16": 4}[kind]
    for language, bytes_ in scores.bytes_.items():
        nats = sum(
            sum(scores.kl_nats[unit][kind][language])  # type: ignore[index] # a precision
            for unit in UNITS
            if (kind := choice.get(unit, "int4")) != "fp16"
        )
        kl[language] = nats / sum(bytes_) / np.log(2)
    return total, kl


def every_choice() -> list[dict[str, str]]:
    return [dict(zip(UNITS, kinds, strict=True)) for kinds in itertools.product(("int4", *MENU), repeat=len(UNITS))]


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all_choices_within_the_budget(seed: int) -> None:
    scores = unit_scores(seed)
    budget = OTHER + sum(SIZES.values()) * 2 + 110
    best = min(max(kl.values()) for total, kl in (by_hand(scores, c) for c in every_choice()) if total <= budget)
    planner = Planner(scores, Demand(limit=Limit(max_bytes=budget), menu=MENU))
    chosen = planner.candidates()[0]
    total, kl = by_hand(scores, dict(chosen.choice))
    assert total <= budget
    assert max(kl.values()) == pytest.approx(best, rel=1e-5)
    assert chosen.predicted == pytest.approx(kl, rel=1e-5)
    plan = planner.plan([chosen])
    assert plan.extra_bytes == total - OTHER - 2 * sum(SIZES.values())
    assert plan.predicted
    assert plan.overrides == chosen.choice


def test_a_unit_gets_nothing_that_its_reader_refuses() -> None:
    scores = unit_scores(1)
    budget = OTHER + sum(SIZES.values()) * 2 + 110
    free = Planner(scores, Demand(limit=Limit(max_bytes=budget), menu=MENU)).candidates()[0].choice
    unit, kind = next(iter(free.items()))
    refused = {unit: (kind,)}
    allowed = [choice for choice in every_choice() if choice[unit] != kind]
    best = min(max(kl.values()) for total, kl in (by_hand(scores, c) for c in allowed) if total <= budget)
    chosen = Planner(scores, Demand(limit=Limit(max_bytes=budget), menu=MENU, refused=refused)).candidates()[0]
    assert chosen.choice.get(unit) != kind
    assert max(by_hand(scores, dict(chosen.choice))[1].values()) == pytest.approx(best, rel=1e-5)


def test_a_target_takes_the_fewest_bytes_and_limits_of_languages_are_kept() -> None:
    scores = unit_scores(1)
    target = 0.3 * max(by_hand(scores, {})[1].values())
    least = min(total for total, kl in map(lambda c: by_hand(scores, c), every_choice()) if max(kl.values()) <= target)
    chosen = Planner(scores, Demand(limit=Limit(target=target), menu=MENU)).candidates()[0]
    assert by_hand(scores, dict(chosen.choice))[0] == least
    cap = 0.01 * by_hand(scores, {})[1]["en"]
    limit = Limit(max_bytes=10**6, languages={"en": cap})
    assert Planner(scores, Demand(limit=limit, menu=MENU)).candidates()[0].predicted["en"] <= cap
    with pytest.raises(QualityGateError, match="no plan by these limits.*en below"):
        Planner(scores, Demand(limit=replace(limit, max_bytes=OTHER + 2 * sum(SIZES.values())), menu=MENU)).candidates()
    with pytest.raises(ConfigError, match="limits of xx, which do not count"):
        Planner(scores, Demand(limit=replace(limit, languages={"xx": 0.1}), menu=MENU)).candidates()


def test_something_stays_quantized_whatever_the_budget() -> None:
    scores = unit_scores(3)
    demand = Demand(limit=Limit(max_bytes=10**6), menu=("fp16",))
    candidates = Planner(scores, demand).candidates()
    least = min(UNITS, key=lambda unit: max(by_hand(scores, {u: "fp16" for u in UNITS if u != unit})[1].values()))
    assert candidates[0].choice == {unit: "fp16" for unit in UNITS if unit != least}
    assert len(candidates) == 1
    with pytest.raises(QualityGateError, match="target 1e-12 takes 16 bit for every unit"):
        Planner(scores, Demand(limit=Limit(target=1e-12), menu=("fp16",))).candidates()


def test_whole_layers_get_one_precision() -> None:
    demand = Demand(limit=Limit(max_bytes=OTHER + 2 * sum(SIZES.values()) + 104), menu=("int8",), whole_layers=True)
    chosen = Planner(unit_scores(), demand).candidates()[0]
    assert list(chosen.choice.values()) == ["int8"]
    assert list(chosen.choice)[0] in ("layers.0", "layers.1")


def test_what_the_user_gave_is_paid_and_counted() -> None:
    scores = unit_scores(2)
    demand = Demand(limit=Limit(max_bytes=10**6), menu=("int8",), overrides={"layers.0.qkv": "fp16"})
    chosen = Planner(scores, demand).candidates()[0]
    assert chosen.choice == {unit: "fp16" if unit == "layers.0.qkv" else "int8" for unit in UNITS}
    assert chosen.predicted == pytest.approx(by_hand(scores, dict(chosen.choice))[1])
    whole = Demand(limit=Limit(max_bytes=10**6), menu=("int8",), overrides={f"layers.{i}": "int8" for i in range(2)})
    with pytest.raises(ConfigError, match="every unit has a precision from the user"):
        Planner(scores, whole).candidates()


def states(figures: dict[str, list[float]]) -> dict[str, StateScores]:
    def row(kl: list[float]) -> LanguageScores:
        count = len(kl)
        return LanguageScores(
            nll_nats=(1.0,) * count, tokens=(9,) * count, bytes_=(50,) * count, kl_nats=tuple(kl), flips=(0,) * count
        )

    zero = [0.0] * len(next(iter(figures.values())))
    every = {BASELINE: zero, **figures}
    return {
        name: StateScores(state=name, languages={tag: row(kl) for tag in ("en", "he")}) for name, kl in every.items()
    }


def test_a_neighbour_is_taken_where_it_is_measurably_better() -> None:
    planner = Planner(unit_scores(), Demand(limit=Limit(max_overhead=0.1), menu=MENU))
    first = planner.candidates()[0]
    other = replace(first, name="neighbour 1", choice={UNITS[3]: "int8"})
    near = states({"the plan": [3.0, 1.0, 3.0, 1.0], "neighbour 1": [1.0, 3.0, 1.0, 2.9]})
    plan = planner.plan([first, other], near)
    assert plan.overrides == first.choice
    assert "none of 1 plans near it is measurably better" in plan.reasons[2]
    far = states({"the plan": [3.0, 3.0, 3.0, 3.1], "neighbour 1": [1.0, 1.1, 1.0, 1.2]})
    plan = planner.plan([first, other], far)
    assert plan.overrides == other.choice
    assert "measurably better than the plan of the best prediction" in plan.reasons[2]
    assert f"measured worst {4.3 / 200 / np.log(2):.4g}" in plan.reasons[2]


def test_halves_that_lead_elsewhere_make_a_plan_unstable() -> None:
    scores = unit_scores()
    flat = {
        unit: {k: {t: (1.0,) * SENTENCES for t in rows} for k, rows in kinds.items()}
        for unit, kinds in scores.kl_nats.items()
    }
    torn = {unit: dict(kinds) for unit, kinds in flat.items()}
    for place, unit in enumerate(UNITS):
        heavy = tuple(100.0 if i % 2 == place % 2 else 0.0 for i in range(SENTENCES))
        torn[unit] = {
            "int4": dict.fromkeys(("en", "he"), heavy),
            "int8": dict.fromkeys(("en", "he"), (0.0,) * SENTENCES),
        }
    limit = Limit(max_bytes=OTHER + 2 * sum(SIZES.values()) + 104)
    unstable = Planner(replace(scores, kl_nats=torn), Demand(limit=limit, menu=MENU))
    assert not unstable.stable
    assert "halves of the sentences lead to other plans" in unstable.plan(unstable.candidates()[:1]).reasons[0]
    strict = Planner(replace(scores, kl_nats=torn), Demand(limit=limit, menu=MENU, strict=True))
    with pytest.raises(QualityGateError, match="the plan is unstable"):
        strict.plan(strict.candidates()[:1])
    assert Planner(replace(scores, kl_nats=flat), Demand(limit=limit, menu=MENU)).stable


def test_a_choice_in_words() -> None:
    grid = Grid(group_size=64)
    assert describe_choice({}, grid, UNITS) == "everything INT4 g64"
    mixed: dict[str, Precision] = {"layers.0.down": "int8", "layers.1.qkv": "fp16"}
    assert describe_choice(mixed, grid, UNITS) == "INT8 for 0.down; 16 bit for 1.qkv; the rest INT4 g64"
    fine: dict[str, Precision] = {"layers.0.qkv": "int4g32", "layers.0.down": "int8"}
    assert describe_choice(fine, grid, UNITS) == "INT4 g32 for 0.qkv; INT8 for 0.down; the rest INT4 g64"
    assert describe_choice(dict.fromkeys(UNITS, "int8"), grid, UNITS) == "INT8 for all units"
    many: dict[str, Precision] = {f"layers.{i}.o": "int8" for i in range(11)}
    assert describe_choice(many, grid, [*many, "layers.11.o"]).endswith("7.o and 3 more; the rest INT4 g64")
