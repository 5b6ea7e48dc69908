"""The seeds' configurations: plans against names written out, bytes against files, disparity by hand, their use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from quant_fairness_plugin.analysis.configurations import Configuration, analyse, with_uses
from quant_fairness_plugin.analysis.named_plans import GATEWAYS, NOTHING, bytes_of, named_plans
from quant_fairness_plugin.artifacts import Grid, Interval, Undefined
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import map_units
from tests.analysis.samples import request_of

Load = Callable[..., LoadedModel]
GRID = Grid(group_size=32)


def test_plans_keep_the_layers_of_their_names(load: Load) -> None:
    loaded = load("gpt2", layers=12)
    units = map_units(loaded)
    plans = {plan.name: plan for plan in named_plans(loaded, units, GRID, seed=0)}
    kept = {name: plan.layers for name, plan in plans.items()}
    assert kept[NOTHING] == ()
    assert kept[GATEWAYS] == (0, 9, 11)
    assert kept["first, 3/4 and the one before, last"] == (0, 8, 9, 11)
    assert kept["third, last"] == (2, 11)
    assert kept["odd layers"] == (1, 3, 5, 7, 9, 11)
    assert {len(kept[name]) for name in kept if name.startswith(("random", "largest"))} == {2}
    rounded = plans["attention"].precisions(units, "int4")
    assert rounded == dict.fromkeys((f"layers.{n}.{part}" for n in range(12) for part in ("fc_in", "fc_out")), "int4")
    assert plans[f"{GATEWAYS} in INT8"].precisions(units, "int4")["layers.9.qkv"] == "int8"
    around = plans["nothing, biases rounded too"].precisions(units, "int4")
    assert around["layers.3.biases"] == around["layers.3.qkv"] == "int4"


def test_bytes_grow_by_what_is_kept_and_simulations_have_none(load: Load) -> None:
    loaded = load("gpt2", layers=4)
    plans = named_plans(loaded, map_units(loaded), GRID, seed=0)
    sizes, sixteen = bytes_of(plans, loaded, GRID)
    found = dict(zip([plan.name for plan in plans], sizes, strict=True))
    assert sixteen == 2 * loaded.parameters
    weights = sum(module.weight.numel() for module in loaded.linears(0).values())  # type: ignore[misc, operator]
    assert found["first"] - found[NOTHING] == weights * 2 - weights // 2 - 2 * weights // 32  # type: ignore[operator]
    assert isinstance(found["nothing, norms rounded too"], Undefined)


def test_the_answer_is_made_of_the_scores(load: Load) -> None:
    answer = analyse(request_of(load("gpt2", layers=4)))
    assert set(answer.scores) == {"16 bit", *(row.kept for row in answer.configurations)}
    by_name = {row.kept: row for row in answer.configurations}
    state = answer.scores[NOTHING].languages
    kl = {name: sum(row.kl_nats) / sum(row.bytes_) for name, row in state.items()}
    row = by_name[NOTHING]
    if isinstance(row.disparity, Interval):
        assert row.disparity.estimate == pytest.approx(kl["he"] / kl["en"], rel=1e-5)
    languages = [(row.kept, row.language, row.script) for row in answer.languages]
    assert languages == [(kept, *pair) for kept in (NOTHING, GATEWAYS) for pair in (("en", "Latin"), ("he", "Hebrew"))]


def configuration(name: str, size: int | Undefined, worst: float) -> Configuration:
    kl = Interval(worst, worst, worst)
    return Configuration(
        kept=name, layers=(), bytes_=size, of_16_bit=0.5, worst_kl=kl, disparity=kl, legacy_label="", label="",
        per_disparity=kl, score=kl, use="",
    )  # fmt: skip


def test_a_plan_is_worth_its_bytes_where_none_is_better_at_as_few() -> None:
    rows = [
        configuration("small", 10, 3.0),
        configuration("better at the same", 20, 1.0),
        configuration("worse at the same", 20, 2.0),
        configuration("larger", 30, 0.5),
        configuration("simulated", Undefined("not stored"), 0.1),
        replace(configuration("lost", 30, 9.0), worst_kl=Undefined("collapsed in he")),
    ]
    uses = {row.kept: row.use for row in with_uses(rows)}
    assert uses == {
        "small": "worth its bytes",
        "better at the same": "worth its bytes",
        "worse at the same": "rather keep better at the same",
        "larger": "worth its bytes",
        "simulated": "simulation only",
        "lost": "collapsed: none",
    }
