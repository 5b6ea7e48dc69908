"""Figures and names as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.report.section import joined
from quant_fairness_plugin.report.words import Figure, Language, decimals, model_words, number, plan_words, size
from tests.report.samples import PLAN


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.0, "0"), (0.4194, "0.419"), (0.01, "0.010"), (0.0042, "0.0042"), (0.00042, "0.00042"), (-0.2, "-0.200")],
)
def test_decimals(value: float, wanted: str) -> None:
    assert decimals(value) == wanted


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (6_660_000, "6.66 MB"), (113_175_416, "113 MB"),
     (999_999, "1 MB"), (7e15, "7000 TB")],
)  # fmt: skip
def test_sizes(count: float, wanted: str) -> None:
    assert size(count) == wanted


def test_an_undefined_figure_says_why() -> None:
    assert number(Undefined("too few")) == Figure("undefined: too few")


def test_languages_have_two_names_and_no_tag_breaks_them() -> None:
    assert Language.of("ar") == Language("ar", "Arabic", "العربية")
    assert Language.of("en").own == ""
    assert Language.of("not a tag!") == Language("not a tag!", "not a tag!", "")


def test_a_plan_in_words() -> None:
    assert plan_words(PLAN) == "layer 0 in 16 bit; layer 2 in 8 bit; 1.down in 16 bit; all else in 4 bit"


def test_a_plan_of_many_parts_is_counted() -> None:
    units = {f"layers.1.{name}": "int8" for name in "abcde"}
    plan = replace(PLAN, units={name: kind for name, kind in PLAN.units.items() if "down" not in name} | units)
    assert plan_words(plan) == "layer 0 in 16 bit; 6 parts of layers in 8 bit; all else in 4 bit"


def test_model_names() -> None:
    assert [model_words(name) for name in ("org/name", "/home/me/model/", "demo")] == ["org/name", "model", "demo"]
    assert joined(["a"]) == "a"
