"""Plans that quantize what stands around the layers, against models that were changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Bootstrap, Grid, StateScores, SweepReport, to_json
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.plans.plan_set import around_plans
from quant_fairness_plugin.plans.units import around_units, check_around, map_units, name_units
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.recommend import recommend_plan
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.walk import score_plans
from tests.export.build import TEXTS
from tests.planted_model import LAYERS, planted_texts

GRID = Grid(group_size=32)
EVERYTHING = ("embeddings", "positions", "biases", "norms", "final_norm", "head")
TOLERANCE = 2e-5
"""Nats per sentence: float32 additions in another order."""


def rounded(value: Tensor) -> Tensor:
    """On INT4: a table in groups of 32 along its rows, a vector with one scale."""
    matrix, grid = (value, GRID) if value.dim() == 2 else (value[None], Grid(group_size=-1))
    return quantize_rtn(matrix, grid, scale_dtype=torch.float16).dequantize().view(value.shape)


def changed_by_hand(loaded: LoadedModel, what: str) -> StateScores:
    """GPT-2 with one kind of parameter rounded; its head is the embedding and stays 16 bit beside it."""
    model = copy.deepcopy(loaded.model)
    own = model.transformer
    if what in ("embeddings", "head"):
        model.lm_head.weight = torch.nn.Parameter(own.wte.weight.detach().clone())
    chosen = {
        "embeddings": [own.wte.weight],
        "positions": [own.wpe.weight],
        "head": [model.lm_head.weight],
        "final_norm": list(own.ln_f.parameters()),
        "biases": [p for name, p in own.h.named_parameters() if name.endswith(".bias")],
        "norms": [own.h[i].get_parameter(f"ln_{n}.weight") for i in range(2) for n in (1, 2)],
    }[what]
    with torch.no_grad():
        for parameter in chosen:
            parameter.copy_(rounded(parameter))
    states = [fixed_state("16 bit", loaded.model), fixed_state(what, model)]
    return score_states(states, loaded.tokenizer, TEXTS)[what]


@pytest.fixture(scope="module")
def gpt2(tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_model("gpt2")))


@pytest.fixture(scope="module")
def report(planted_model: Path) -> SweepReport:
    loaded, texts = load_model(str(planted_model)), planted_texts().part("search")
    config = SweepConfig(modes=("protect-one", "quantize-one"), also=("embeddings", "norms"), top=1)
    return sweep_units(loaded, texts, config, grid=GRID, bootstrap=Bootstrap(draws=100))


@pytest.mark.parametrize("what", EVERYTHING)
def test_each_is_quantized_alone(what: str, gpt2: LoadedModel) -> None:
    units = map_units(gpt2)
    [plan] = around_plans([what], units, ["layers.0", "layers.1"], ["quantize-one"])
    assert plan.name == f"quantize {what}"
    before = gpt2.model.transformer.wte.weight.clone()
    found = score_plans(
        gpt2, {plan.name: plan.precisions((), "int4")}, TEXTS, units=units, bank=RtnBank(gpt2, units, GRID)
    )
    expected = changed_by_hand(gpt2, what)
    for language, row in expected.languages.items():
        np.testing.assert_allclose(found[plan.name].languages[language].kl_nats, row.kl_nats, atol=TOLERANCE)
        assert max(row.kl_nats) > 10 * TOLERANCE
    assert torch.equal(before, gpt2.model.transformer.wte.weight)


def test_together_with_all_layers_one_at_a_time_is_left_out(gpt2: LoadedModel) -> None:
    layers = ["layers.0", "layers.1"]
    plans = {
        plan.name: plan.precisions(layers, "int4")
        for plan in around_plans(["embeddings", "positions"], map_units(gpt2), layers, ["protect-one"])
    }
    assert {name: sorted(plan) for name, plan in plans.items()} == {
        "none with embeddings+positions": ["embeddings", "layers.0", "layers.1", "positions"],
        "none with positions": ["layers.0", "layers.1", "positions"],
        "none with embeddings": ["embeddings", "layers.0", "layers.1"],
        "protect 0 with embeddings+positions": ["embeddings", "layers.1", "positions"],
        "protect 1 with embeddings+positions": ["embeddings", "layers.0", "positions"],
    }


def test_a_table_is_rounded_whatever_its_number_of_rows(tiny_model: Callable[..., Path]) -> None:
    """OPT has two more positions than it can use: no multiple of eight, which only packing needs."""
    loaded = load_model(str(tiny_model("opt")))
    assert loaded.model.get_parameter("model.decoder.embed_positions.weight").shape[0] % 8 == 2
    made = RtnBank(loaded, map_units(loaded), GRID).weights("positions", "int4")
    assert list(made) == ["model.decoder.embed_positions.weight"]


def test_a_report_keeps_them_apart(report: SweepReport) -> None:
    layers = [f"protect {layer} with embeddings+norms" for layer in range(LAYERS)]
    assert [row.plan for row in report.around] == [
        "quantize embeddings", "quantize norms", "none with embeddings+norms", "none with norms",
        "none with embeddings", *layers,
    ]  # fmt: skip
    assert not {row.plan for row in report.around} & {row.plan for row in report.rows}
    assert report.units == tuple(f"layers.{layer}" for layer in range(LAYERS))
    for ranking in report.rankings.values():
        assert set(getattr(ranking, "units", ())) <= set(report.units)


def test_they_change_nothing_else(report: SweepReport, planted_model: Path) -> None:
    loaded, texts = load_model(str(planted_model)), planted_texts().part("search")
    config = SweepConfig(modes=("protect-one", "quantize-one"), top=1)
    plain = sweep_units(loaded, texts, config, grid=GRID, bootstrap=Bootstrap(draws=100))
    assert plain.around == ()
    assert [to_json(row) for row in plain.rows] == [to_json(row) for row in report.rows]
    assert plain.rankings == report.rankings
    assert recommend_plan(plain, top=1) == recommend_plan(report, top=1)


def test_more_quantized_is_more_damage(report: SweepReport) -> None:
    worst = {row.plan: row.objectives["worst"].estimate for row in (*report.rows, *report.around)}  # type: ignore[union-attr]
    assert worst["none with embeddings+norms"] > worst["none"]
    assert worst["quantize embeddings"] > 0


@pytest.mark.parametrize(
    ("names", "family", "message"),
    [
        (("positions",), "llama", "has no positions"),
        (("biases",), "llama", "has no biases"),
        (("layers",), "llama", "'layers' is not around the layers; use embeddings, positions, biases"),
        (("head", "head"), "gpt2", "'head' is listed twice"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(
    names: tuple[str, ...], family: str, message: str, tiny_model: Callable[..., Path]
) -> None:
    loaded = load_model(str(tiny_model(family)))
    with pytest.raises(ConfigError, match=message):
        around_units(names, map_units(loaded))
    outline = outline_model(loaded.files)
    with pytest.raises(ConfigError, match=message):
        check_around(names, name_units(outline.family, outline.layers, outline.shapes), outline.shapes, GRID)


def test_groups_that_do_not_divide_a_table_are_refused(tiny_model: Callable[..., Path], gpt2: LoadedModel) -> None:
    check_around(("embeddings",), map_units(gpt2), {"transformer.wte.weight": (264, 32)}, Grid())  # takes 32
    assert RtnBank(gpt2, map_units(gpt2), Grid()).weights("embeddings", "int4")
    gpt2 = load_model(str(tiny_model("gpt2", width=40)))
    outline = outline_model(gpt2.files)
    units = name_units(outline.family, outline.layers, outline.shapes)
    with pytest.raises(
        ConfigError, match="embeddings: transformer.wte.weight has rows of 40 values, which groups of 32 do not divide"
    ):
        check_around(("embeddings",), units, outline.shapes, Grid(group_size=64))
    with pytest.raises(ConfigError, match="wte.weight has rows of 40 values, which groups of 32 do not divide"):
        RtnBank(gpt2, map_units(gpt2), Grid(group_size=64)).weights("embeddings", "int4")
    check_around(("biases", "norms"), units, outline.shapes, Grid(group_size=64))
