from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.recommend.allocation import (
    Allocation,
    Infeasible,
    Limit,
    UnitBytes,
    UnitDamage,
    allocate,
    predict_damage,
)
from quant_fairness_plugin.recommend.milp import NODES, TIE, Problem, Selection
from tests.planted import LANGUAGES as PLANTED
from tests.planted import state

LANGUAGES = ("en", "he", "zh")
PRECISIONS: tuple[Precision, ...] = ("int4", "int8", "fp16")
Case = tuple[dict[str, dict[Precision, int]], dict[str, dict[Precision, dict[str, float]]]]


def random_case(seed: int, units: int = 5) -> Case:
    draw = np.random.default_rng(seed)
    bytes_: dict[str, dict[Precision, int]] = {}
    damage: dict[str, dict[Precision, dict[str, float]]] = {}
    for i in range(units):
        size, unit = int(draw.integers(50, 400)), f"layers.{i}"
        bytes_[unit] = {"int4": size // 4 + 3, "int8": size // 2 + 3, "fp16": size}
        harm = {language: float(draw.gamma(1.0, 0.02)) for language in LANGUAGES}
        damage[unit] = {
            precision: {language: share * value for language, value in harm.items()}
            for precision, share in zip(PRECISIONS, (1.0, 0.06, 0.0), strict=True)
        }
    return bytes_, damage


def every_choice(bytes_: UnitBytes, damage: UnitDamage, base: dict[str, float]) -> Iterator[tuple[Any, int, Any]]:
    for picked in itertools.product(*(options for options in bytes_.values())):
        choice = dict(zip(bytes_, picked, strict=True))
        total = sum(bytes_[unit][p] for unit, p in choice.items())
        yield (
            choice,
            total,
            {name: base[name] + sum(damage[u][p][name] for u, p in choice.items()) for name in base},
        )


def judged(harm: dict[str, float], objective: str, weights: dict[str, float]) -> float:
    if objective == "worst":
        top = max(weights.values())
        return max(weights[name] / top * harm[name] for name in harm if weights[name])
    return sum(weights[name] * harm[name] for name in harm) / sum(weights.values())


EQUAL = dict.fromkeys(LANGUAGES, 1.0)
UNEQUAL = {"en": 0.5, "he": 3.0, "zh": 0.0}


@pytest.mark.parametrize("objective", ["worst", "mean"])
@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_gives_what_trying_every_choice_gives(objective: str, weights: dict[str, float], seed: int) -> None:
    bytes_, damage = random_case(seed)
    base = {"en": 0.01, "he": 0.0, "zh": 0.002}
    choices = list(every_choice(bytes_, damage, base))
    least = min(total for _, total, _ in choices)
    for extra in (0, 37, 150, 400, 10_000):
        found = allocate(
            bytes_,
            damage,
            Limit(max_bytes=least + 11 + extra),
            base=base,
            other_bytes=11,
            objective=objective,
            weights=weights,
        )
        assert isinstance(found, Allocation)
        values = [(judged(harm, objective, weights), total) for _, total, harm in choices if total <= least + extra]
        best = min(value for value, _ in values)
        assert found.value == pytest.approx(best, rel=1e-5, abs=1e-9)
        assert found.bytes_ - 11 == min(total for value, total in values if value <= best + 1e-9)
        assert found.gap == 0
        assert found.predicted


@pytest.mark.parametrize("objective", ["worst", "mean"])
@pytest.mark.parametrize("seed", range(4))
def test_a_target_gives_the_fewest_bytes_of_every_choice(objective: str, seed: int) -> None:
    bytes_, damage = random_case(seed)
    base = dict.fromkeys(LANGUAGES, 0.001)
    choices = [(judged(harm, objective, EQUAL), total) for _, total, harm in every_choice(bytes_, damage, base)]
    for target in np.quantile([value for value, _ in choices], [0.01, 0.3, 0.9]):
        found = allocate(bytes_, damage, Limit(target=float(target)), base=base, objective=objective)
        assert isinstance(found, Allocation)
        fewest = min(total for value, total in choices if value <= target)
        assert found.bytes_ == fewest
        best = min(value for value, total in choices if total == fewest)
        assert found.value == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_figures_are_those_of_the_chosen_units() -> None:
    bytes_, damage = random_case(7)
    base = dict.fromkeys(LANGUAGES, 0.0)
    found = allocate(bytes_, damage, Limit(max_overhead=0.5), base=base, other_bytes=100, floor_bytes=500)
    assert isinstance(found, Allocation)
    assert found.bytes_ == 100 + sum(bytes_[unit][p] for unit, p in found.units.items())
    assert found.overhead == pytest.approx((found.bytes_ - 500) / 500, abs=1e-6)
    for name, value in found.damage.items():
        assert value == pytest.approx(sum(damage[u][p][name] for u, p in found.units.items()), rel=1e-6)
    assert max(found.damage.values()) == pytest.approx(found.value)


def test_gains_over_the_all_quantized_state_are_negative_damage() -> None:
    bytes_: UnitBytes = {"a": {"int4": 1, "fp16": 4}, "b": {"int4": 1, "fp16": 4}}
    damage: UnitDamage = {
        "a": {"int4": {"en": 0.0, "he": 0.0}, "fp16": {"en": -0.3, "he": -0.1}},
        "b": {"int4": {"en": 0.0, "he": 0.0}, "fp16": {"en": 0.0, "he": -0.2}},
    }
    base = {"en": 0.5, "he": 0.6}
    worst = allocate(bytes_, damage, Limit(max_bytes=5), base=base)
    mean = allocate(bytes_, damage, Limit(max_bytes=5), base=base, objective="mean")
    assert isinstance(worst, Allocation)
    assert isinstance(mean, Allocation)
    assert worst.units == {"a": "fp16", "b": "int4"}
    assert worst.value == pytest.approx(0.5)
    assert mean.value == pytest.approx((0.2 + 0.5) / 2)
    he_only = allocate(bytes_, damage, Limit(max_bytes=5), base=base, weights={"en": 0.0, "he": 2.0})
    assert isinstance(he_only, Allocation)
    assert he_only.units == {"a": "int4", "b": "fp16"}


def test_a_weight_of_0_does_not_hold_the_worst_above_0() -> None:
    bytes_: UnitBytes = {"a": {"int4": 1, "fp16": 2}}
    damage: UnitDamage = {"a": {"int4": {"en": -0.1, "he": 9.0}, "fp16": {"en": -0.4, "he": 9.0}}}
    found = allocate(bytes_, damage, Limit(max_bytes=2), base={"en": 0.0, "he": 0.0}, weights={"en": 1.0, "he": 0.0})
    assert isinstance(found, Allocation)
    assert found.value == pytest.approx(-0.4)
    assert found.units == {"a": "fp16"}


def test_equal_damage_is_settled_by_bytes_then_by_the_mean() -> None:
    nothing: dict[str, float] = {"en": 0.0, "he": 0.0}
    bytes_: UnitBytes = {
        "a": {"int4": 10, "int8": 20, "fp16": 40},
        "b": {"int4": 10, "int8": 10},
        "c": {"int4": 10},
    }
    damage: UnitDamage = {
        "a": dict.fromkeys(PRECISIONS, nothing),
        "b": {"int4": {"en": 0.2, "he": 0.0}, "int8": {"en": 0.1, "he": 0.0}},
        "c": {"int4": {"en": 0.0, "he": 0.5}},
    }
    found = allocate(bytes_, damage, Limit(max_bytes=1000), base=nothing)
    assert isinstance(found, Allocation)
    assert found.units == {"a": "int4", "b": "int8", "c": "int4"}
    assert found.bytes_ == 30


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [Limit(max_bytes=10**6), Limit(target=1.0)])
def test_units_that_do_no_harm_get_their_cheapest_precision(seed: int, limit: Limit) -> None:
    draw = np.random.default_rng(seed)
    bytes_ = {
        f"layers.{i}": dict(zip(PRECISIONS, draw.permutation([10, 20, 40]).tolist(), strict=True)) for i in range(8)
    }
    damage = {unit: dict.fromkeys(PRECISIONS, dict.fromkeys(LANGUAGES, 0.0)) for unit in bytes_}
    found = allocate(bytes_, damage, limit, base=EQUAL)  # type: ignore[arg-type]
    assert isinstance(found, Allocation)
    assert found.bytes_ == 80


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [Limit(max_bytes=8), Limit(target=0.9)])
def test_of_equal_worst_damage_and_bytes_the_lower_mean_is_taken(seed: int, limit: Limit) -> None:
    draw = np.random.default_rng(seed)
    bytes_ = {f"layers.{i}": dict.fromkeys(PRECISIONS, 1) for i in range(8)}
    damage = {
        unit: {
            precision: {"en": float(harm), "he": 0.0}
            for precision, harm in zip(PRECISIONS, draw.permutation([0.0, 0.01, 0.02]), strict=True)
        }
        for unit in bytes_
    }
    found = allocate(bytes_, damage, limit, base={"en": 0.0, "he": 0.9})  # type: ignore[arg-type]
    assert isinstance(found, Allocation)
    assert found.damage == {"en": 0.0, "he": 0.9}


def test_of_equal_worst_damage_fewer_bytes_come_before_a_lower_mean() -> None:
    bytes_ = {f"layers.{i}": {"int4": 1, "fp16": 4} for i in range(8)}
    damage = {unit: {"int4": {"en": 0.0, "he": 0.02}, "fp16": {"en": 0.0, "he": 0.0}} for unit in bytes_}
    found = allocate(bytes_, damage, Limit(max_bytes=10**6), base={"en": 0.9, "he": 0.0})  # type: ignore[arg-type]
    assert isinstance(found, Allocation)
    assert found.bytes_ == 8


@pytest.mark.parametrize("seed", range(6))
def test_of_the_smallest_allocations_that_reach_a_target_the_least_harmful_is_taken(seed: int) -> None:
    gains = np.random.default_rng(seed).uniform(0.3, 0.5, (2, 9))
    bytes_ = {f"layers.{i}": {"int4": 1, "fp16": 4} for i in range(9)}
    damage = {
        f"layers.{i}": {"int4": {"en": gains[0, i], "he": gains[1, i]}, "fp16": {"en": 0.0, "he": 0.0}}
        for i in range(9)
    }
    base = {"en": 0.0, "he": 0.0}
    target = float(gains.sum(axis=1).max()) - 1.0
    found = allocate(bytes_, damage, Limit(target=target), base=base)  # type: ignore[arg-type]
    reaching = [
        (total, max(harm.values()))
        for _, total, harm in every_choice(bytes_, damage, base)  # type: ignore[arg-type]
        if max(harm.values()) <= target
    ]
    assert isinstance(found, Allocation)
    assert (found.bytes_, found.value) == (min(reaching)[0], pytest.approx(min(reaching)[1], rel=TIE))


@pytest.mark.parametrize("seed", range(4))
def test_a_solution_that_is_nearly_the_best_is_not_enough(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_plugin.recommend.milp.NODES", 100 * NODES)
    draw = np.random.default_rng(seed)
    bytes_, damage = {}, {}
    for i in range(12):
        size = int(draw.integers(1000, 2000))
        bytes_[f"layers.{i:02}"] = {"int4": 0, "fp16": size}
        harm = {"en": size * (1.0 + 1e-4 * float(draw.standard_normal()))}
        damage[f"layers.{i:02}"] = {"int4": harm, "fp16": {"en": 0.0}}
    budget = 7900
    # A large constant makes what is left to gain small beside the whole, which a relative gap would overlook.
    found = allocate(bytes_, damage, Limit(max_bytes=budget), base={"en": 5e4})  # type: ignore[arg-type]
    choices = every_choice(bytes_, damage, {"en": 5e4})  # type: ignore[arg-type]
    best = min(harm["en"] for _, total, harm in choices if total <= budget)
    assert isinstance(found, Allocation)
    assert found.value == pytest.approx(best, rel=TIE)


def test_a_budget_holds_where_the_solver_is_off_by_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Problem._solve

    def generous(problem: Problem, minimise: str, max_bytes: int | None, max_value: float) -> Selection | None:
        return exact(problem, minimise, None if max_bytes is None else max_bytes + 1, max_value)

    monkeypatch.setattr(Problem, "_solve", generous)
    bytes_, damage = random_case(2)
    least = sum(min(options.values()) for options in bytes_.values())
    for budget in range(least, least + 60):
        found = allocate(bytes_, damage, Limit(max_bytes=budget), base=EQUAL)
        assert isinstance(found, Allocation)
        assert found.bytes_ <= budget


def test_the_answer_does_not_depend_on_the_order_of_the_units() -> None:
    bytes_ = {f"layers.{i}": {"int4": 10, "fp16": 40} for i in range(6)}
    same = {"int4": dict.fromkeys(LANGUAGES, 0.1), "fp16": dict.fromkeys(LANGUAGES, 0.0)}
    damage = dict.fromkeys(bytes_, same)
    base = dict.fromkeys(LANGUAGES, 0.0)
    backwards = {unit: dict(reversed(options.items())) for unit, options in reversed(bytes_.items())}
    first = allocate(bytes_, damage, Limit(max_bytes=125), base=base)  # type: ignore[arg-type]
    second = allocate(backwards, damage, Limit(max_bytes=125), base=base)  # type: ignore[arg-type]
    assert first == second


def test_sizes_of_a_large_model_stay_within_the_budget_to_the_byte() -> None:
    draw = np.random.default_rng(3)
    bytes_, damage = {}, {}
    for i in range(9):
        size = int(draw.integers(10**9, 4 * 10**9)) * 2 + 1
        bytes_[f"layers.{i}"] = {"int4": size // 4, "fp16": size}
        harm = {name: float(draw.gamma(1.0, 1e-4)) for name in LANGUAGES}
        damage[f"layers.{i}"] = {"int4": harm, "fp16": dict.fromkeys(LANGUAGES, 0.0)}
    base = dict.fromkeys(LANGUAGES, 0.0)
    choices = [(judged(harm, "worst", EQUAL), total) for _, total, harm in every_choice(bytes_, damage, base)]  # type: ignore[arg-type]
    for total in sorted(total for _, total in choices)[5::97]:
        for budget in (total, total - 1):
            found = allocate(bytes_, damage, Limit(max_bytes=budget), base=base)  # type: ignore[arg-type]
            assert isinstance(found, Allocation)
            assert found.bytes_ <= budget
            best = min(value for value, size in choices if size <= budget)
            assert found.value <= best + 2 * TIE * 1e-3


def test_an_overhead_is_read_as_a_decimal() -> None:
    bytes_: UnitBytes = {"a": {"int4": 1000, "fp16": 1570}}
    damage: UnitDamage = {"a": {"int4": {"en": 1.0}, "fp16": {"en": 0.0}}}
    found = allocate(bytes_, damage, Limit(max_overhead=0.57), base={"en": 0.0}, floor_bytes=1000)
    assert isinstance(found, Allocation)
    assert found.units == {"a": "fp16"}


def test_a_budget_below_the_smallest_allocation_is_infeasible() -> None:
    bytes_, damage = random_case(0)
    least = 5 + sum(min(options.values()) for options in bytes_.values())
    found = allocate(bytes_, damage, Limit(max_bytes=least - 1), base=EQUAL, other_bytes=5)
    assert isinstance(found, Infeasible)
    assert f"takes {least} bytes and the budget is {least - 1}" in found.reason
    assert isinstance(allocate(bytes_, damage, Limit(max_bytes=least), base=EQUAL, other_bytes=5), Allocation)


def test_a_target_below_all_allocations_is_infeasible_and_says_what_can_be_reached() -> None:
    bytes_, damage = random_case(0)
    found = allocate(bytes_, damage, Limit(target=0.2), base=dict.fromkeys(LANGUAGES, 0.25))
    assert isinstance(found, Infeasible)
    assert "below 0.25 and the target is 0.2" in found.reason


def call(**changes: Any) -> Allocation | Infeasible:
    bytes_, damage = random_case(0, units=2)
    given: dict[str, Any] = {"bytes_": bytes_, "damage": damage, "base": EQUAL, "max_bytes": 10**6} | changes
    limit = Limit(**{name: given.pop(name, None) for name in ("max_bytes", "max_overhead", "target")})
    return allocate(given.pop("bytes_"), given.pop("damage"), limit, **given)


def broken(part: str) -> dict[str, Any]:
    bytes_, damage = random_case(0, units=2)
    if part == "unit":
        del damage["layers.1"]
    elif part == "precision":
        del damage["layers.1"]["int8"]
    elif part == "language":
        del damage["layers.1"]["int8"]["he"]
    elif part == "nan":
        damage["layers.1"]["int8"]["he"] = float("nan")
    else:
        bytes_["layers.1"]["int8"] = -1
    return {"bytes_": bytes_, "damage": damage}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.1}, "max_bytes and target given: give exactly one"),
        ({"max_bytes": None}, "no limit given"),
        ({"max_bytes": None, "max_overhead": 0.1}, "give its size as floor_bytes"),
        ({"max_bytes": None, "max_overhead": -0.1, "floor_bytes": 9}, "share of 0 or more"),
        ({"floor_bytes": 0}, "at least one byte"),
        ({"objective": "disparity"}, "use worst or mean"),
        ({"bytes_": {}, "damage": {}}, "nothing to allocate"),
        ({"base": {}}, "nothing to allocate"),
        ({"weights": {"en": 1.0}}, "no weight for he, zh"),
        ({"weights": EQUAL | {"fr": 1.0}}, "weights for fr"),
        ({"weights": EQUAL | {"en": -1.0}}, "numbers of 0 or more"),
        ({"weights": dict.fromkeys(LANGUAGES, 0.0)}, "not all 0"),
        (broken("unit"), r"'layers\.1' has no damage"),
        (broken("precision"), "give the same precisions"),
        (broken("language"), "has no damage of he"),
        (broken("nan"), "not finite"),
        (broken("bytes"), "has -1 bytes in int8"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(**changes)


def test_a_search_without_proof_says_how_far_it_may_be_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    bytes_, damage = {}, {}
    for i in range(60):
        size = int(draw.integers(1000, 9000))
        bytes_[f"layers.{i:02}"] = {"int4": size // 4, "int8": size // 2, "fp16": size}
        harm = draw.gamma(1.0, 1.0, 3)
        damage[f"layers.{i:02}"] = {
            precision: {name: float(share * value) for name, value in zip(LANGUAGES, harm, strict=True)}
            for precision, share in zip(PRECISIONS, (1.0, 0.06, 0.0), strict=True)
        }
    base = dict.fromkeys(LANGUAGES, 0.0)
    budget = int(1.2 * sum(options["int4"] for options in bytes_.values()))
    monkeypatch.setattr("quant_fairness_plugin.recommend.milp.NODES", 1)
    quick = allocate(bytes_, damage, Limit(max_bytes=budget), base=base)  # type: ignore[arg-type]
    monkeypatch.setattr("quant_fairness_plugin.recommend.milp.NODES", 100 * NODES)
    proven = allocate(bytes_, damage, Limit(max_bytes=budget), base=base)  # type: ignore[arg-type]
    assert isinstance(quick, Allocation)
    assert isinstance(proven, Allocation)
    assert proven.gap == 0
    assert 0 < quick.gap < 1
    assert "ended with a gap of" in quick.reason
    assert quick.value * (1 - quick.gap) <= proven.value <= quick.value
    assert quick.bytes_ <= budget


def test_quantized_units_add_to_the_16_bit_model() -> None:
    scores = {
        BASELINE: state(BASELINE, dict.fromkeys(PLANTED, 0.0)),
        "quantize layers.0": state("q0", {"en": 1.0, "he": 2.0, "zh": 0.5}, noise=0.0),
        "quantize layers.1": state("q1", {"en": 0.5, "he": 0.1, "zh": 0.2}, noise=0.0),
    }
    states: dict[str, dict[Precision, str]] = {
        f"layers.{i}": {"int4": f"quantize layers.{i}", "fp16": BASELINE} for i in range(2)
    }
    damage, base = predict_damage(scores, states, PLANTED, over=BASELINE)
    assert base == dict.fromkeys(PLANTED, 0.0)
    assert damage["layers.0"]["fp16"] == base
    assert damage["layers.0"]["int4"]["he"] == pytest.approx(2.0 / (80 * np.log(2)))
    found = allocate({unit: {"int4": 1, "fp16": 4} for unit in states}, damage, Limit(max_bytes=5), base=base)
    assert isinstance(found, Allocation)
    assert found.units == {"layers.0": "fp16", "layers.1": "int4"}


def test_protected_units_take_from_the_all_quantized_model() -> None:
    scores = {
        "none": state("none", dict.fromkeys(PLANTED, 4.0), noise=0.0),
        "protect layers.0": state("p0", {"en": 3.0, "he": 3.5, "zh": 4.0}, noise=0.0),
    }
    states: dict[str, dict[Precision, str]] = {"layers.0": {"int4": "none", "fp16": "protect layers.0"}}
    damage, base = predict_damage(scores, states, PLANTED, over="none")
    bit = 80 * np.log(2)
    assert base == pytest.approx(dict.fromkeys(PLANTED, 4.0 / bit))
    assert damage["layers.0"]["int4"] == dict.fromkeys(PLANTED, 0.0)
    assert damage["layers.0"]["fp16"] == pytest.approx({"en": -1.0 / bit, "he": -0.5 / bit, "zh": 0.0})


def test_states_that_were_not_scored_are_refused() -> None:
    scores = {"none": state("none", dict.fromkeys(PLANTED, 4.0))}
    with pytest.raises(ConfigError, match="'protect layers.0' was not scored"):
        predict_damage(scores, {"layers.0": {"fp16": "protect layers.0"}}, PLANTED, over="none")
    with pytest.raises(ConfigError, match="no scores of fr"):
        predict_damage(scores, {}, ("en", "fr"), over="none")


def test_solving_does_not_import_torch() -> None:
    code = "import sys, quant_fairness_plugin.recommend.allocation; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("seed", range(6))
def test_limits_of_languages_are_kept_at_the_least_damage(seed: int) -> None:
    bytes_, damage = random_case(seed)
    base = dict.fromkeys(LANGUAGES, 0.0)
    budget = sum(row["int8"] for row in bytes_.values())
    free = allocate(bytes_, damage, Limit(max_bytes=budget), base=base, objective="mean")
    assert isinstance(free, Allocation)
    cap = 0.8 * free.damage["he"]
    kept = [
        (judged(harm, "mean", EQUAL), total)
        for _, total, harm in every_choice(bytes_, damage, base)
        if harm["he"] <= cap and total <= budget
    ]
    found = allocate(bytes_, damage, Limit(max_bytes=budget, languages={"he": cap}), base=base, objective="mean")
    if not kept:
        assert isinstance(found, Infeasible)
        assert "he below" in found.reason
        return
    assert isinstance(found, Allocation)
    assert found.damage["he"] <= cap * (1 + 1e-6)
    assert found.value == pytest.approx(min(kept)[0], rel=1e-5)


def test_limits_out_of_reach_and_unknown_ones_are_named() -> None:
    bytes_, damage = random_case(1)
    base = dict.fromkeys(LANGUAGES, 0.1)
    found = allocate(bytes_, damage, Limit(max_bytes=10**6, languages={"he": 0.05}), base=base)
    assert found == Infeasible(
        "no allocation is predicted to keep he below 0.05: raise the limits, or offer higher precisions"
    )
    with pytest.raises(ConfigError, match="limits of fi, which do not count"):
        allocate(bytes_, damage, Limit(max_bytes=10**6, languages={"fi": 0.05}), base=base)
    with pytest.raises(ConfigError, match="limit he=0: give the largest KL"):
        allocate(bytes_, damage, Limit(max_bytes=10**6, languages={"he": 0}), base=base)
    small = allocate(
        bytes_, damage, Limit(max_bytes=sum(row["int4"] for row in bytes_.values()), languages={"he": 0.11}), base=base
    )
    assert isinstance(small, Infeasible)
    assert "raise it to" in small.reason
