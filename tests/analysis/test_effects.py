from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.analysis.effects import WORST, Effects, TwoByTwo, effects_of, undefined_effects
from quant_fairness_plugin.artifacts import Interval, Undefined


def series(estimate: float, spread: float = 0.001) -> np.ndarray:
    """An estimate and 200 resamples that move together with those of every other series."""
    return np.concatenate([[estimate], estimate + spread * np.linspace(-1, 1, 200)])


def crossed(first: float, other: float, first_kept: float, other_kept: float, spread: float = 0.001) -> Effects:
    kept = (series(first_kept, spread), series(other_kept, spread))
    return effects_of(WORST, series(first, spread), series(other, spread), kept)


def test_effects_that_add_up_have_no_interaction() -> None:
    found = crossed(0.5, 0.375, 0.25, 0.125, spread=0.0)  # exact in binary
    assert found.interaction == Interval(0.0, 0.0, 0.0)
    assert found.both == Interval(0.375, 0.375, 0.375)


def test_effects_that_multiply_have_a_relative_interaction_of_one_and_less_than_the_sum() -> None:
    found = crossed(0.10, 0.05, 0.06, 0.03, spread=0.0)
    assert found.relative_interaction == Interval(1.0, 1.0, 1.0)
    assert isinstance(found.interaction, Interval)
    assert found.interaction.estimate == pytest.approx(0.07 - 0.05 - 0.04)
    assert found.interaction.high < 0


def test_what_both_resamples_share_cancels() -> None:
    found = crossed(0.10, 0.07, 0.06, 0.02, spread=0.05)
    assert isinstance(found.calibration, Interval)
    assert found.calibration.low == pytest.approx(0.03)
    assert found.calibration.high == pytest.approx(0.03)


def test_a_combination_without_any_damage_has_no_factor() -> None:
    found = crossed(0.10, 0.07, 0.06, 0.0, spread=0.0)
    assert isinstance(found.relative_interaction, Undefined)
    assert isinstance(found.interaction, Interval)


def test_without_protection_only_calibration_is_left() -> None:
    found = effects_of("he", series(0.1), series(0.07), None)
    assert isinstance(found.calibration, Interval)
    assert found.both == found.interaction == found.relative_interaction == Undefined("nothing is protected")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ((0.10, 0.05, 0.06, 0.03), "other calibration instead of first helps without protection: it lowers"),
        ((0.10, 0.12, 0.06, 0.07), "does not help without protection: it raises the worst language's KL by 0.02000"),
        ((0.10, 0.10, 0.06, 0.06), "does not measurably help without protection: it lowers the worst language's KL by"),
        ((0.10, 0.05, 0.06, 0.03), "together they bring 0.02000 [0.02000, 0.02000] bits per byte less than the sum"),
        ((0.10, 0.09, 0.08, 0.03), "together they bring 0.04000 [0.04000, 0.04000] bits per byte more than the sum"),
        ((0.5, 0.375, 0.25, 0.125), "together they bring the sum of each alone"),  # exact in binary
        ((0.10, 0.07, 0.06, 0.03), "protection helps under other calibration: it lowers the worst language's KL by"),
    ],
)
def test_the_verdict_says_what_helps_and_what_does_not(cells: tuple[float, float, float, float], said: str) -> None:
    assert said in TwoByTwo(first="first", other="other", effects=(crossed(*cells, spread=0.0),)).verdict


def test_an_undefined_effect_is_said_with_its_reason() -> None:
    table = TwoByTwo(first="english", other="uniform", effects=(undefined_effects(WORST, "collapsed in he"),))
    assert table.verdict == (
        "what uniform calibration instead of english does without protection is undefined: collapsed in he"
    )
