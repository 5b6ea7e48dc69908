"""Which sweep holds the plans of which other one, and what no model can be swept with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import Bootstrap, Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from tests.planted_model import planted_texts

GREEDY = Search(method="greedy", size=2)
WIDE = SweepConfig(
    modes=("protect-one", "quantize-one"),
    precisions=("fp16", "int8"),
    combine=2,
    search=GREEDY,
    max_plans=3,
    also=("norms",),
    top=1,
)
"""A sweep of everything."""


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"modes": ("quantize-one",), "precisions": ("fp16",)},
        {"precisions": ("fp16",)},
        {"combine": 1},
        {"combine": 1, "max_plans": 512},
        {"search": None},
        {"also": ()},
    ],
)
def test_a_sweep_covers_what_it_holds(change: dict[str, Any]) -> None:
    assert WIDE.covers(replace(WIDE, **change))
    if change not in ({}, {"combine": 1, "max_plans": 512}):
        assert not replace(WIDE, **change).covers(WIDE)


@pytest.mark.parametrize(
    "change",
    [
        {"granularity": "unit"},
        {"precisions": ("fp16", "int5")},
        {"combine": 3},
        {"max_plans": 4},
        {"search": Search(method="greedy", size=3)},
        {"also": ("norms", "head")},
        {"top": 2},
    ],
)
def test_a_sweep_does_not_cover_what_it_lacks(change: dict[str, Any]) -> None:
    assert not WIDE.covers(replace(WIDE, **change))


def test_a_report_gives_back_the_configuration_that_it_was_made_with(planted_model: Path) -> None:
    loaded, texts = load_model(str(planted_model)), planted_texts().part("search").take(range(4))
    report = sweep_units(loaded, texts, WIDE, grid=Grid(group_size=32), bootstrap=Bootstrap(draws=100))
    assert SweepConfig.of(report) == WIDE
    assert list(report.provenance.arguments) == [
        "grid", "dtype", "bank", "modes", "granularity", "precisions", "combine", "search", "max_plans", "also",
        "reference", "top", "draws",
    ]  # fmt: skip


def test_options_can_be_lists() -> None:
    made = SweepConfig.make(["protect-one"], precisions=["fp16", "int8"], also=["head"], top=2)
    assert made == SweepConfig(precisions=("fp16", "int8"), also=("head",), top=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ()}, "no mode to sweep in"),
        ({"combine": 4}, "combine 4 is not allowed"),
        ({"max_plans": 0}, "max_plans 0 allows no pair"),
        ({"precisions": ("int8",)}, "precisions int8: name fp16"),
        ({"precisions": ("fp16", "int8"), "modes": ("quantize-one",)}, "add mode protect-one"),
        ({"also": ("layers",)}, "'layers' is not around the layers; use embeddings, positions"),
        ({"also": ("head", "head")}, "'head' is listed twice"),
        ({"top": 0}, "top 0 ranks nothing; use 1 or more"),
    ],
)
def test_what_no_model_can_be_swept_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepConfig(**options)


def test_what_a_model_cannot_be_swept_with_is_refused() -> None:
    units = [f"layers.{layer}" for layer in range(3)]
    assert SweepConfig(combine=2).plan_set(units, "int4").counts == {2: 3}
    with pytest.raises(ConfigError, match="combine 3 would single out all 3 units"):
        SweepConfig(combine=3).plan_set(units, "int4")
    with pytest.raises(ConfigError, match="a search for 2 of 2 units leaves none quantized"):
        SweepConfig(search=GREEDY).plan_set(units[:2], "int4")
    with pytest.raises(ConfigError, match="int8 is what all other units get"):
        SweepConfig(precisions=("fp16", "int8")).plan_set(units, "int8")
