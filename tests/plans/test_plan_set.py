from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest

from quant_fairness_plugin.artifacts import Combinations, Mode, Precision, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import (
    Plan,
    PlanSet,
    check_plans,
    check_precisions,
    leading_units,
    most_units,
)
from tests.planted import LANGUAGES, state

UNITS = tuple(f"layers.{i}" for i in range(6))
MODES: tuple[Mode, ...] = ("protect-one", "quantize-one")
Asked = Mapping[str, Mapping[str, Precision]]


def added_up(plans: Asked) -> dict[str, StateScores]:
    """Every quantized layer i adds i + 1 nats: the last one counts most."""
    harm = {"16 bit": 0.0} | {name: sum(1.0 + int(unit[-1]) for unit in plan) for name, plan in plans.items()}
    return {name: state(name, dict.fromkeys(LANGUAGES, nats), noise=0.0) for name, nats in harm.items()}


class Walks:
    """Scores plans, and remembers which were asked for together."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, plans: Asked) -> dict[str, StateScores]:
        self.asked.append(list(plans))
        return added_up(plans)


@pytest.mark.parametrize(
    ("mode", "units", "name", "quantized"),
    [
        (None, (), "none", {0, 1, 2}),
        ("protect-one", ("layers.1",), "protect 1", {0, 2}),
        ("protect-one", ("layers.0", "layers.2"), "protect 0+2", {1}),
        ("quantize-one", ("layers.0", "layers.2"), "quantize 0+2", {0, 2}),
    ],
)
def test_a_plan_is_named_and_spelled_out(
    mode: Mode | None, units: tuple[str, ...], name: str, quantized: set[int]
) -> None:
    plan = Plan(mode, units)
    assert plan.name == name
    assert plan.precisions(UNITS[:3], "int3") == {f"layers.{i}": "int3" for i in sorted(quantized)}


def test_units_are_named_without_what_all_share() -> None:
    assert Plan("protect-one", ("layers.3.down", "layers.5.qkv")).name == "protect 3.down+5.qkv"


def test_a_unit_at_another_precision_is_named_by_it() -> None:
    plan = Plan("protect-one", ("layers.1",), "int8")
    assert plan.name == "int8 1"
    assert not plan.keeps_16_bit
    assert plan.precisions(UNITS[:3], "int4") == {"layers.0": "int4", "layers.1": "int8", "layers.2": "int4"}
    assert Plan("protect-one", ("layers.1",)).keeps_16_bit
    assert not Plan("quantize-one", ("layers.1",)).keeps_16_bit


def test_a_plan_can_quantize_what_is_around_the_layers_too() -> None:
    around = {"embeddings": ("embeddings",), "norms": ("layers.0.norms", "layers.1.norms")}
    vectors = dict.fromkeys(("embeddings", "layers.0.norms", "layers.1.norms"), "int4")
    plan = Plan("protect-one", ("layers.1",), around=around)
    assert plan.name == "protect 1 with embeddings+norms"
    assert not plan.keeps_16_bit
    assert plan.precisions(UNITS[:2], "int4") == {"layers.0": "int4"} | vectors
    alone = Plan("quantize-one", ("norms",), around={"norms": around["norms"]})
    assert alone.name == "quantize norms"
    assert alone.precisions(UNITS[:2], "int4") == {"layers.0.norms": "int4", "layers.1.norms": "int4"}


def test_every_unit_is_swept_at_every_precision_and_sets_in_16_bit_alone() -> None:
    planned = PlanSet(UNITS, MODES, 2, 20, "int4", ("fp16", "int8", "int5"))
    plans, _ = planned.evaluate(Walks())
    names = [plan.name for plan in plans]
    assert len(names) == len(set(names)) == 1 + 4 * 6 + 2 * 15
    assert {f"{kind} {i}" for kind in ("protect", "int8", "int5", "quantize") for i in range(6)} <= set(names)
    assert all(plan.precision == "fp16" for plan in plans if len(plan.units) > 1)


@pytest.mark.parametrize(
    ("precisions", "modes", "message"),
    [
        ((), MODES, "name fp16, which units are ranked by"),
        (("int8",), MODES, "precisions int8: name fp16"),
        (("fp16", "int8", "int8"), MODES, "and each one once"),
        (("fp16", "int4"), MODES, "int4 is what all other units get; leave it out"),
        (("fp16", "int8"), ("quantize-one",), "add mode protect-one, or use fp16"),
    ],
)
def test_precisions_that_single_nothing_out_are_refused(
    precisions: tuple[Precision, ...], modes: tuple[Mode, ...], message: str
) -> None:
    check_precisions(("fp16", "int8", "int3"), MODES, "int4")
    check_precisions(("fp16",), ("quantize-one",), "int4")
    with pytest.raises(ConfigError, match=message):
        check_precisions(precisions, modes, "int4")
    with pytest.raises(ConfigError, match=message):
        PlanSet(UNITS, modes, 1, 1, "int4", precisions)


def test_sets_that_all_fit_take_one_walk() -> None:
    walks = Walks()
    planned = PlanSet(UNITS, ("protect-one",), 3, 20, "int4")
    plans, scores = planned.evaluate(walks)
    assert walks.asked == [[plan.name for plan in plans]]
    assert len(plans) == 1 + 6 + 15 + 20
    assert list(scores) == ["16 bit", *(plan.name for plan in plans)]
    assert planned.combinations[3] == Combinations(evaluated=20, possible=20)


def test_sets_that_do_not_fit_are_those_of_the_units_that_count_most() -> None:
    walks = Walks()
    planned = PlanSet(UNITS, ("protect-one",), 3, 15, "int4")
    plans, scores = planned.evaluate(walks)
    assert planned.combinations == {
        1: Combinations(evaluated=6, possible=6),
        2: Combinations(evaluated=15, possible=15),
        3: Combinations(evaluated=10, possible=20),
    }
    assert [len(names) for names in walks.asked] == [1 + 6 + 15, 10]
    triples = [plan.units for plan in plans if len(plan.units) == 3]
    assert triples == list(combinations(UNITS[1:], 3))
    assert set(scores) == {"16 bit", *(plan.name for plan in plans)}


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_counts_by_what_protecting_helps_or_quantizing_hurts(mode: Mode) -> None:
    plans = [Plan(mode, (unit,)) for unit in UNITS]
    scores = added_up({plan.name: plan.precisions(UNITS, "int4") for plan in plans})
    assert leading_units(scores, UNITS, mode, 2) == UNITS[4:]


@pytest.mark.parametrize(("size", "limit", "count"), [(2, 1, 2), (2, 14, 5), (2, 15, 6), (3, 4, 4), (3, 3, 3)])
def test_the_limit_is_one_of_sets(size: int, limit: int, count: int) -> None:
    assert most_units(6, size, limit) == count


@pytest.mark.parametrize(
    ("modes", "combine", "max_plans", "message"),
    [
        ((), 1, 1, "no mode to sweep in"),
        (MODES, 4, 1, "combine 4 is not allowed"),
        (MODES, 0, 1, "combine 0 is not allowed"),
        (MODES, 2, 0, "max_plans 0 allows no pair"),
    ],
)
def test_what_cannot_be_swept_is_refused(modes: tuple[Mode, ...], combine: int, max_plans: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plans(modes, UNITS, combine, max_plans)
    with pytest.raises(ConfigError, match=message):
        PlanSet(UNITS, modes, combine, max_plans, "int4")


def test_a_set_of_all_units_is_refused() -> None:
    check_plans(MODES, UNITS[:3], 2)
    with pytest.raises(ConfigError, match="combine 3 would single out all 3 units"):
        check_plans(MODES, UNITS[:3], 3)
