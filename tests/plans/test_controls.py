from __future__ import annotations

import itertools
import math

import pytest

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.controls import (
    Control,
    controls_for,
    gateway_layers,
    pattern_controls,
    random_controls,
    scored_control,
    uniform_controls,
)
from quant_fairness_plugin.plans.costs import Costs


def even_costs(layers: int = 12) -> Costs:
    """Layers of one size: 4 bits are 25, 5 bits 31, 8 bits 50, 16 bits 100 bytes."""
    return Costs({f"layers.{i}": {"int4": 25, "int5": 31, "int8": 50, "fp16": 100} for i in range(layers)}, "int4", 500)


def uneven_costs() -> Costs:
    sizes = (90, 100, 110, 97, 104, 120, 88, 101, 113, 95, 108, 99)
    return Costs({f"layers.{i}": {"int4": size // 4, "fp16": size} for i, size in enumerate(sizes)}, "int4", 500)


def protected(control: Control) -> tuple[int, ...]:
    return tuple(int(unit.split(".")[1]) for unit, kind in control.precisions.items() if kind == "fp16")


def named(controls: tuple[Control, ...]) -> dict[str, Control]:
    return {control.name: control for control in controls}


PLAN: dict[str, Precision] = {"layers.2": "fp16", "layers.5": "fp16", "layers.7": "fp16"}


@pytest.mark.parametrize("costs", [even_costs(), uneven_costs()])
def test_random_plans_are_distinct_and_cost_the_same(costs: Costs) -> None:
    target = costs.total(PLAN)
    found = random_controls(costs, target, count=20, seed=0, exclude=PLAN)
    assert len({frozenset(control.precisions) for control in found}) == 20
    assert set(PLAN) not in [set(control.precisions) for control in found]
    for control in found:
        assert control.bytes_ == costs.total(control.precisions)
        assert abs(control.bytes_ - target) <= costs.tolerance
        assert control.matched
        assert control.difference == control.bytes_ - target


def test_random_plans_are_reproducible_and_follow_the_seed() -> None:
    costs = uneven_costs()
    target = costs.total(PLAN)
    assert random_controls(costs, target, seed=4) == random_controls(costs, target, seed=4)
    assert random_controls(costs, target, seed=4) != random_controls(costs, target, seed=5)


def test_all_random_plans_come_back_where_there_are_fewer_than_asked_for() -> None:
    costs = even_costs(4)
    plan: dict[str, Precision] = {"layers.0": "fp16", "layers.1": "fp16"}
    found = random_controls(costs, costs.total(plan), count=20, exclude=plan)
    assert {protected(control) for control in found} == set(itertools.combinations(range(4), 2)) - {(0, 1)}


def test_random_plans_of_equal_layers_are_equally_likely() -> None:
    costs = even_costs(5)
    plan: dict[str, Precision] = {"layers.0": "fp16", "layers.1": "fp16"}
    draws = 600
    first = [protected(random_controls(costs, costs.total(plan), count=1, seed=seed)[0]) for seed in range(draws)]
    share, error = draws / 10, math.sqrt(draws * 0.1 * 0.9)
    for pair in itertools.combinations(range(5), 2):
        assert abs(first.count(pair) - share) < 4 * error


def test_a_plan_that_protects_nothing_has_no_random_controls() -> None:
    costs = even_costs()
    assert random_controls(costs, costs.total({})) == ()


def test_patterns_depend_on_depth_alone() -> None:
    costs = even_costs()
    found = named(pattern_controls(costs, costs.total(PLAN)))
    assert {name: protected(control) for name, control in found.items()} == {
        "first": (0, 1, 2),
        "last": (9, 10, 11),
        "ends": (0, 1, 11),
        "gateway": (0, 9, 11),
        "even": (2, 6, 10),
        "odd": (3, 7, 11),
        "first half": (1, 3, 5),
        "second half": (7, 9, 11),
    }
    assert all(control.matched and control.difference == 0 for control in found.values())


@pytest.mark.parametrize("members", range(1, 13))
def test_patterns_of_any_size_hold_that_many_layers_or_say_that_they_cannot(members: int) -> None:
    costs = even_costs()
    target = costs.total({f"layers.{i}": "fp16" for i in range(members)})
    for control in pattern_controls(costs, target):
        room = 6 if control.name in ("even", "odd", "first half", "second half") else 12
        assert len(protected(control)) == len(set(protected(control))) == min(members, room)
        assert control.matched == (members <= room)
        assert ("fewer than the plan, beyond half" in control.why) == (members > room)


def test_the_nearest_number_of_layers_is_taken_where_sizes_differ() -> None:
    costs = uneven_costs()
    target = costs.total(PLAN)
    for control in pattern_controls(costs, target):
        assert control.bytes_ == costs.total(control.precisions)
        assert control.matched == (abs(control.bytes_ - target) <= costs.tolerance)
        assert abs(control.difference) <= 120 * 0.75 / 2 + 1  # half of the largest layer: one more or fewer is further
        assert not control.difference or f"{abs(control.difference)} bytes" in control.why


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_few_layers_have_patterns_too(layers: int) -> None:
    costs = even_costs(layers)
    for control in pattern_controls(costs, costs.total({"layers.0": "fp16"})):
        assert len(protected(control)) == (0 if layers == 1 and control.name in ("odd", "second half") else 1)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 12, 24, 32, 33])
def test_the_gateway_rule_holds_for_any_depth(layers: int) -> None:
    assert set(gateway_layers(layers)) == {0, (3 * layers) // 4, layers - 1}
    assert set(gateway_layers(layers, disparity_target=0.7)) == {0, layers - 1}
    assert set(gateway_layers(layers, disparity_target=0.69)) == set(gateway_layers(layers))


def test_a_model_without_layers_has_no_gateway() -> None:
    with pytest.raises(ConfigError, match="0 layers"):
        gateway_layers(0)


def test_scores_choose_the_highest_and_the_earlier_of_equals() -> None:
    costs = even_costs()
    target = costs.total(PLAN)
    scores = [0.0, 5.0, 1.0, 5.0, 0.0, 0.0, 0.0, 0.0, 9.0, 1.0, 0.0, 5.0]
    control = scored_control("kurtosis", scores, costs, target)
    assert protected(control) == (1, 3, 8)
    assert control.why == "highest kurtosis first"
    with pytest.raises(ConfigError, match="kurtosis: 2 scores for 12 units"):
        scored_control("kurtosis", [1.0, 2.0], costs, target)
    with pytest.raises(ConfigError, match="one finite number for each"):
        scored_control("kurtosis", [float("nan")] * 12, costs, target)


def test_more_bits_for_all_are_shown_at_their_own_bytes_and_spread_at_the_plans() -> None:
    costs = even_costs()
    found = named(uniform_controls(costs, costs.total(PLAN)))
    # 12 layers in INT5 cost less than the plan: there is no other way to spread it.
    assert list(found) == ["uniform int5", "uniform int8", "spread int8"]
    assert set(found["uniform int8"].precisions.values()) == {"int8"}
    assert len(found["uniform int8"].precisions) == 12
    assert found["uniform int8"].bytes_ == 500 + 12 * 50
    assert not found["uniform int8"].matched
    assert "more than the plan" in found["uniform int8"].why
    assert len(found["spread int8"].precisions) == 9
    assert found["spread int8"].difference == 0
    assert found["uniform int5"].difference == 12 * 6 - 3 * 75


def test_a_precision_that_some_layer_lacks_is_not_uniform() -> None:
    bytes_: dict[str, dict[Precision, int]] = {
        "layers.0": {"int4": 25, "int8": 50, "fp16": 100},
        "layers.1": {"int4": 25, "fp16": 100},
        "layers.2": {"int3": 20, "int4": 25, "fp16": 100},
    }
    assert uniform_controls(Costs(bytes_, "int4"), 200) == ()


def test_all_controls_come_together_with_the_bytes_of_a_plan_of_smaller_units() -> None:
    costs = even_costs()
    target = costs.total(PLAN) + 30
    plan: dict[str, Precision] = PLAN | {"layers.0.down": "fp16"}
    found = controls_for(plan, costs, plan_bytes=target, scores={"variance": list(range(12))})
    names = [control.name for control in found]
    assert names[:20] == [f"random {i}" for i in range(20)]
    assert {"gateway", "first", "variance", "uniform int8"} <= set(names)
    assert all(control.bytes_ - target == control.difference for control in found)
    with pytest.raises(ConfigError, match=r"'layers\.0\.down' has no bytes in fp16; give the plan's own bytes"):
        controls_for(plan, costs)


def test_costs_must_have_something_to_protect() -> None:
    with pytest.raises(ConfigError, match="nothing to control for"):
        Costs({}, "int4")
    with pytest.raises(ConfigError, match="give int4 and fp16"):
        Costs({"layers.0": {"int8": 5, "fp16": 9}}, "int4")
    with pytest.raises(ConfigError, match="not smaller in int4"):
        Costs({"layers.0": {"int4": 9, "fp16": 9}}, "int4")
