from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import Precision, SweepReport
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.recommend import Limit, recommend_plan
from quant_fairness_plugin.recommend.allocated import options_of
from quant_fairness_plugin.recommend.assembly import bytes_of, priced_units
from tests.planted import LANGUAGES, planted_report, planted_sets

GAIN = [0.1, 0.4, 1.5, 0.2, 1.2, 0.3, 0.9, 0.05]
UNITS = tuple(f"layers.{i}" for i in range(8))
SINGLE: dict[tuple[str, ...], float | Mapping[str, float]] = {(u,): g for u, g in zip(UNITS, GAIN, strict=True)}
# 8 layers of 1000 bytes, 510 in int8, 320 in int5 or 260 quantized, and 500 others.
FLOOR, STEP, WIDE, FIVE = 2580, 740, 250, 60


def mixed(kinds: tuple[Precision, ...] = ("int8",), share: float = 0.9) -> SweepReport:
    """Every layer in 16 bit, and at other precisions which bring a share of that."""
    others: dict[Precision, Mapping[str, float]] = {
        kind: {u: share * g for u, g in zip(UNITS, GAIN, strict=True)} for kind in kinds
    }
    return planted_sets(SINGLE, others=others, noise=0.001)


def chosen(report: SweepReport, *, weights: Mapping[str, float] | None = None, **limits: Any) -> dict[str, Precision]:
    plan = recommend_plan(report, Limit(**limits), weights=weights, draws=200)
    return {f"layers.{layer}": "fp16" for layer in plan.protected_layers} | plan.overrides  # type: ignore[return-value]


@pytest.mark.parametrize("budget", [FLOOR + STEP, FLOOR + 2 * STEP + 10, FLOOR + 4 * WIDE])
def test_a_budget_is_spent_as_trying_every_mixture_says(budget: int) -> None:
    """Gains are the same for every language, so that the gain alone decides."""
    worth = {"fp16": (1.0, STEP), "int8": (0.9, WIDE), "int4": (0.0, 0)}

    def gain(choice: Mapping[str, str]) -> float:
        return sum(GAIN[UNITS.index(unit)] * worth[kind][0] for unit, kind in choice.items())

    found: list[tuple[float, int]] = [(0.0, 0)]
    for own in GAIN:
        found = [
            (value + own * share, size + extra)
            for value, size in found
            for share, extra in worth.values()
            if FLOOR + size + extra <= budget
        ]
    best = max(value for value, _ in found)
    answer = chosen(mixed(), max_bytes=budget)
    assert gain(answer) == pytest.approx(best, rel=1e-3)
    assert bytes_of(mixed(), answer) <= budget


def test_a_plan_of_two_precisions_says_what_it_costs() -> None:
    plan = recommend_plan(mixed(), Limit(max_bytes=FLOOR + 4 * WIDE), draws=200)
    assert plan.overrides == {f"layers.{i}": "int8" for i in (1, 2, 4, 6)}
    assert plan.extra_bytes == 4 * WIDE
    assert plan.predicted
    assert plan.stable
    assert plan.source == f"auto by worst within {FLOOR + 4 * WIDE} bytes"
    assert plan.reasons[0].startswith("predicted from single units: least worst damage within 3580 bytes: worst 0.07")


def test_a_target_is_reached_with_the_fewest_bytes() -> None:
    report = mixed()
    options = options_of(report, {})
    target = max(options.predicted({"layers.2": "int8", "layers.4": "int8"}).values())
    plan = recommend_plan(report, Limit(target=target * 1.0001), draws=200)
    assert plan.overrides == {"layers.2": "int8", "layers.4": "int8"}
    assert plan.source.startswith("auto by worst for at most 0.")
    nothing = recommend_plan(report, Limit(target=1.0), draws=200)
    assert nothing.extra_bytes == 0
    assert "the target is reached with nothing protected: worst 0.14" in nothing.reasons[0]


def test_a_target_out_of_reach_is_said_and_strict_refuses() -> None:
    plan = recommend_plan(mixed(), Limit(target=1e-6), draws=200)
    assert plan.extra_bytes == 0
    assert "no allocation is predicted to bring the worst damage below" in plan.reasons[0]
    with pytest.raises(QualityGateError, match="no allocation is predicted"):
        recommend_plan(mixed(), Limit(target=1e-6), draws=200, strict=True)


def test_simulated_precisions_are_chosen_and_said_to_be_so() -> None:
    plan = recommend_plan(mixed(("int5",)), Limit(max_bytes=FLOOR + 2 * FIVE), draws=200)
    assert plan.overrides == {"layers.2": "int5", "layers.4": "int5"}
    assert plan.extra_bytes == 2 * FIVE
    assert "int5 is simulated: no checkpoint format here holds it, and this plan cannot be exported" in plan.reasons[-1]
    assert not any(
        "simulated" in reason for reason in recommend_plan(mixed(), Limit(max_bytes=3580), draws=200).reasons
    )


def test_what_cannot_be_afforded_leaves_nothing_and_says_why() -> None:
    plan = recommend_plan(mixed(), Limit(max_bytes=FLOOR + WIDE - 1), draws=200)
    assert plan.extra_bytes == 0
    assert plan.reasons[0] == f"the cheapest change takes {WIDE} bytes and the budget leaves {WIDE - 1}"
    below = recommend_plan(mixed(), Limit(max_bytes=FLOOR - 1), draws=200)
    assert below.reasons[0].startswith(f"the smallest allocation takes {FLOOR} bytes and the budget is {FLOOR - 1}")


def test_units_that_hurt_when_protected_are_left() -> None:
    report = planted_report([-0.1, -0.3, -0.5, -0.2, -0.4, -0.6, -0.7, -0.9], noise=0.001)
    plan = recommend_plan(report, Limit(max_overhead=1.0), draws=200)
    assert plan.protected_layers == ()
    assert plan.reasons[0] == "no choice within the budget is predicted to lower the damage"


def test_an_unstable_ranking_protects_nothing_under_a_budget_but_answers_a_target() -> None:
    report = planted_report([0.0] * 8, noise=0.3)
    assert chosen(report, max_bytes=2 * FLOOR) == {}
    assert (
        "unstable ranking, so nothing is protected"
        in recommend_plan(report, Limit(max_bytes=2 * FLOOR), draws=200).reasons[0]
    )
    base = max(options_of(report, {}).base.values())
    plan = recommend_plan(report, Limit(target=0.999 * base), draws=200)
    assert plan.protected_layers
    assert not plan.stable
    with pytest.raises(QualityGateError, match="unstable"):
        recommend_plan(report, Limit(target=0.999 * base), draws=200, strict=True)


def test_language_weights_decide_between_units_that_help_different_languages() -> None:
    gains: dict[tuple[str, ...], float | Mapping[str, float]] = {
        ("layers.0",): {"en": 3.0, "he": 0.1, "zh": 0.1},
        ("layers.1",): {"en": 0.1, "he": 3.0, "zh": 0.2},
        ("layers.2",): {"en": 0.05, "he": 0.05, "zh": 0.05},
    }
    report = planted_sets(gains, noise=0.001)
    budget = 500 + 3 * 260 + STEP
    assert chosen(report, max_bytes=budget) == {"layers.1": "fp16"}
    weights = {"en": 5.0, "he": 1.0, "zh": 1.0}
    assert chosen(report, max_bytes=budget, weights=weights) == {"layers.0": "fp16"}
    assert "with weights" in recommend_plan(report, Limit(max_bytes=budget), weights=weights, draws=200).source
    with pytest.raises(ConfigError, match="no weight for he, zh"):
        recommend_plan(report, Limit(max_bytes=budget), weights={"en": 1.0}, draws=200)


PAIRS: dict[tuple[str, ...], float | Mapping[str, float]] = {
    (a, b): GAIN[UNITS.index(a)] + GAIN[UNITS.index(b)] for a, b in combinations(UNITS, 2)
}


def test_the_best_evaluated_set_is_taken_before_a_prediction() -> None:
    """Protecting 1 and 6 is worth more together than 2 and 4, which look best alone."""
    report = planted_sets(SINGLE | PAIRS | {("layers.1", "layers.6"): 3.5}, noise=0.001)
    plan = recommend_plan(report, Limit(max_overhead=0.6), draws=200)
    assert plan.protected_layers == (1, 6)
    assert plan.reasons[0].startswith("'protect 1+6' was evaluated on the search part: worst 0.08")
    assert (
        "better than 2,4, which is predicted 0.09556, 0.09415 with the mean error of such predictions"
        in plan.reasons[0]
    )
    assert plan.predicted
    assert recommend_plan(report, top=2, draws=200).protected_layers == (2, 4)


def test_an_evaluated_set_that_is_the_prediction_itself_is_said_to_be_evaluated() -> None:
    plan = recommend_plan(planted_sets(SINGLE | PAIRS, noise=0.001), Limit(max_overhead=0.6), draws=200)
    assert plan.protected_layers == (2, 4)
    assert "'protect 2+4' was evaluated on the search part" in plan.reasons[0]
    assert "the best of the evaluated plans" in plan.reasons[0]


def test_predictions_are_compared_with_what_they_turned_out_to_be_worth() -> None:
    """Two sets of three were evaluated, both 1.0 worse than added up: so is, probably, the predicted set."""
    three = ("layers.1", "layers.2", "layers.4")
    sets = {three: 0.4 + 1.5 + 1.2 - 1.0, ("layers.2", "layers.4", "layers.5"): 1.5 + 1.2 + 0.3 - 1.0}
    report = planted_sets(SINGLE | sets, noise=0.001)
    plan = recommend_plan(report, Limit(max_overhead=0.9), draws=200)
    assert plan.protected_layers == (2, 4, 6)
    sets = {three: 0.4 + 1.5 + 1.2 - 0.1, ("layers.2", "layers.4", "layers.5"): 1.5 + 1.2 + 0.3 - 1.6}
    better = planted_sets(SINGLE | sets, noise=0.001)
    answer = recommend_plan(better, Limit(max_overhead=0.9), draws=200)
    assert answer.protected_layers == (1, 2, 4)
    assert "with the mean error of such predictions" in answer.reasons[0]


def test_a_target_prefers_an_evaluated_set_that_is_no_larger() -> None:
    report = planted_sets(SINGLE | {("layers.1", "layers.6"): 3.5}, noise=0.001)
    target = (8.0 - 2.6) / 80 / 0.6931
    assert chosen(report, target=target) == {"layers.1": "fp16", "layers.6": "fp16"}


def test_evaluated_sets_do_not_count_where_the_user_gave_precisions() -> None:
    report = planted_sets(SINGLE | PAIRS | {("layers.1", "layers.6"): 3.5}, noise=0.001)
    plan = recommend_plan(report, Limit(max_overhead=0.75), draws=200, overrides={"layers.0": "int8"})
    assert plan.protected_layers == (2, 4)
    assert plan.overrides == {"layers.0": "int8"}
    assert plan.extra_bytes == 2 * STEP + WIDE


def test_objectives_that_cannot_be_added_up_fill_a_budget_from_the_ranking() -> None:
    report = planted_report(GAIN, noise=0.001)
    assert recommend_plan(report, Limit(max_overhead=0.6), objective="bpb", draws=200).protected_layers == (2, 4)
    with pytest.raises(ConfigError, match="objective 'bpb' cannot be added up over units; use worst or mean"):
        recommend_plan(report, Limit(max_bytes=9999), objective="bpb", draws=200)


@pytest.mark.parametrize(
    "options", [{"limit": Limit(max_bytes=9)}, {"limit": Limit(target=0.1)}, {"weights": {"en": 1.0}}]
)
def test_a_number_of_units_goes_with_no_other_limit(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave out max_bytes, target and weights"):
        recommend_plan(planted_report(GAIN), top=3, draws=200, **options)


def test_two_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_bytes and target given: give exactly one"):
        recommend_plan(planted_report(GAIN), Limit(max_bytes=9999, target=0.1), draws=200)


def test_a_sweep_that_quantized_one_at_a_time_is_added_up_from_16_bit() -> None:
    """Quantizing layer i alone does all but `GAIN[i]` of the harm: 7 and 0 do most."""
    swept = planted_sets(SINGLE, noise=0.001)
    rows = [replace(row, plan=row.plan.replace("protect", "quantize")) for row in swept.rows if row.units]
    report = replace(
        swept,
        rows=tuple(replace(row, mode="quantize-one", precision="int4") for row in rows),
        scores={name.replace("protect", "quantize"): scores for name, scores in swept.scores.items()},
    )
    assert options_of(report, {}).base == dict.fromkeys(LANGUAGES, 0.0)
    assert recommend_plan(report, Limit(max_bytes=FLOOR + 2 * STEP), draws=200).protected_layers == (0, 7)


def test_units_without_bytes_are_no_choice() -> None:
    report = planted_report(GAIN, noise=0.001, groups=("o", "down"))
    sizes = {name: size for name, size in report.layer_bytes.items() if not name.endswith(".down")}
    bare = replace(report, layer_bytes=sizes)
    assert priced_units(bare) == tuple(unit for unit in report.units if unit.endswith(".o"))
    assert all(unit.endswith(".o") for unit in chosen(bare, max_overhead=2.0))
