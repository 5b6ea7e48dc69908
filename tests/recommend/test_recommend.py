from __future__ import annotations

from dataclasses import replace

import pytest

from quant_fairness_plugin.artifacts import Grid, Precision, SweepReport
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.recommend import Limit, describe_overrides, explicit_plan, recommend_plan
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
    plan = recommend_plan(planted_report(BENEFIT, noise=0.001), Limit(max_overhead=budget), draws=200)
    assert len(plan.protected_layers) == layers
    assert plan.overhead <= budget


def test_auto_protects_nothing_when_the_ranking_is_unstable() -> None:
    plan = recommend_plan(planted_report([0.0] * 8, noise=0.3), Limit(max_overhead=1.0), draws=200)
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


SIZES = {
    "fp16": (1000, 1000, 1000), "quantized": (260, 260, 260), "int8": (510, 510, 510),
    "fp16.down": (400, 400, 400), "quantized.down": (110, 110, 110), "int8.down": (210, 210, 210),
}  # fmt: skip


def test_an_explicit_plan_pays_for_units_and_8_bit_layers() -> None:
    overrides: dict[str, Precision] = {"layers.1": "int8", "layers.2.down": "fp16"}
    plan = explicit_plan((0,), model="m", grid=Grid(), layer_bytes=SIZES, other_bytes=220, overrides=overrides)
    assert plan.protected_layers == (0,)
    assert plan.overrides == overrides
    assert plan.extra_bytes == 740 + 250 + 290
    assert plan.overhead == pytest.approx((740 + 250 + 290) / 1000)
    assert plan.source == "explicit"
    assert explicit_plan((), model="m", grid=Grid(), layer_bytes=SIZES, other_bytes=220).source == "none"


def test_a_unit_within_an_8_bit_layer_has_its_own_price() -> None:
    overrides: dict[str, Precision] = {"layers.1": "int8", "layers.1.down": "fp16"}
    plan = explicit_plan((), model="m", grid=Grid(), layer_bytes=SIZES, other_bytes=220, overrides=overrides)
    assert plan.extra_bytes == 250 + (400 - 210)


def test_what_a_plan_singles_out_is_said_in_words() -> None:
    overrides: dict[str, Precision] = {
        "layers.1": "int8", "layers.2": "int8", "layers.2.down": "fp16", "layers.1.down": "int4",
    }  # fmt: skip
    plan = explicit_plan((0,), model="m", grid=Grid(), layer_bytes=SIZES, other_bytes=0, overrides=overrides)
    assert describe_overrides(plan) == "layers 1, 2 in 8 bit; 2.down in 16 bit; 1.down in 4 bit"
    bare = explicit_plan((0,), model="m", grid=Grid(), layer_bytes=SIZES, other_bytes=0)
    assert describe_overrides(bare) == ""


def report_with_units() -> SweepReport:
    """As `planted_report(BENEFIT)`, with the bytes of 8-bit layers and of one unit."""
    units = {"int8": 510, "fp16.down": 400, "quantized.down": 110, "int8.down": 210}
    report = planted_report(BENEFIT, noise=0.001)
    return replace(report, layer_bytes=report.layer_bytes | {name: (size,) * 8 for name, size in units.items()})


def test_layers_with_a_precision_of_their_own_are_no_candidates() -> None:
    plan = recommend_plan(report_with_units(), top=3, draws=200, overrides={"layers.4": "int8"})
    assert plan.protected_layers == (1, 2, 6)
    assert plan.overrides == {"layers.4": "int8"}
    assert plan.extra_bytes == 3 * STEP + 250
    overrides: dict[str, Precision] = {"layers.4": "int8", "layers.0": "int8"}
    with pytest.raises(ConfigError, match="top 7 asks for more layers than the 6"):
        recommend_plan(report_with_units(), top=7, draws=200, overrides=overrides)


def test_units_of_a_chosen_layer_are_part_of_it() -> None:
    overrides: dict[str, Precision] = {"layers.2.down": "fp16", "layers.0.down": "fp16"}
    plan = recommend_plan(report_with_units(), top=1, draws=200, overrides=overrides)
    assert plan.protected_layers == (2,)
    assert plan.overrides == {"layers.0.down": "fp16"}
    assert plan.extra_bytes == STEP + 290


@pytest.mark.parametrize(("budget", "layers"), [(0.28, 0), (0.41, 1), (0.05, 0)])
def test_the_budget_pays_for_overrides_first(budget: float, layers: int) -> None:
    """One unit costs 290 bytes, 11.2 % of the all-quantized 2580; a layer another 28.7 %."""
    plan = recommend_plan(
        report_with_units(), Limit(max_overhead=budget), draws=200, overrides={"layers.0.down": "fp16"}
    )
    assert len(plan.protected_layers) == layers
    assert plan.extra_bytes == 290 + layers * STEP


GROUPS = ("o", "down")
# 4 layers with two of their units: all quantized is 500 + 4 · 260 = 1540 bytes, each protected unit adds 290 (18.8 %).
UNIT_FLOOR, UNIT_STEP = 1540, 290


def unit_report(noise: float = 0.001) -> SweepReport:
    return planted_report(BENEFIT, noise=noise, groups=GROUPS)


def test_a_sweep_of_units_gives_a_plan_of_units() -> None:
    plan = recommend_plan(unit_report(), top=3, draws=200)
    assert plan.protected_layers == ()
    assert list(plan.overrides) == ["layers.1.o", "layers.2.o", "layers.3.o"]
    assert set(plan.overrides.values()) == {"fp16"}
    assert plan.layers == 4
    assert plan.extra_bytes == 3 * UNIT_STEP
    assert "3 units as requested" in plan.reasons[0]
    with pytest.raises(ConfigError, match="top 8 is not a number of units; the sweep has 8, use 1..7"):
        recommend_plan(unit_report(), top=8, draws=200)


@pytest.mark.parametrize(("budget", "units"), [(0.18, []), (0.19, ["layers.1.o"]), (0.4, ["layers.1.o", "layers.2.o"])])
def test_the_budget_is_solved_for_units(budget: float, units: list[str]) -> None:
    plan = recommend_plan(unit_report(), Limit(max_overhead=budget), draws=200)
    assert list(plan.overrides) == units
    assert plan.extra_bytes == len(units) * UNIT_STEP
    assert plan.overhead <= budget
    if not units:
        assert plan.reasons[0] == (
            "one unit costs more than the budget of 18.00%: the first of the ranking, 1.o, takes 18.83%"
        )


def test_units_of_a_layer_with_a_precision_of_its_own_are_no_candidates() -> None:
    report = unit_report()
    wide = {"int8": (510,) * 4, "int8.o": (210,) * 4}
    report = replace(report, layer_bytes=report.layer_bytes | wide)
    plan = recommend_plan(report, top=2, draws=200, overrides={"layers.1": "int8", "layers.2.down": "fp16"})
    assert plan.overrides == {"layers.1": "int8", "layers.2.o": "fp16", "layers.2.down": "fp16", "layers.3.o": "fp16"}


def test_a_unit_that_costs_nothing_to_protect_never_ends_with_all_of_them() -> None:
    report = unit_report()
    same = report.layer_bytes | {"quantized.o": (400,) * 4, "quantized.down": (400,) * 4}
    plan = recommend_plan(replace(report, layer_bytes=same), Limit(max_overhead=0.0), draws=200)
    assert len(plan.overrides) == 7
