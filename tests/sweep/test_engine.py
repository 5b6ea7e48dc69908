from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, Ranking, SweepReport, to_json
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.sweep.engine import count_bytes, plan_trials, sweep_layers
from tests.planted_model import IDLE_LAYER, LAYERS, PLANTED_LAYER, planted_texts

GRID = Grid(group_size=32)
BOTH = ("protect-one", "quantize-one")


@pytest.fixture(scope="module")
def loaded(planted_model: Path) -> LoadedModel:
    return load_model(str(planted_model))


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> SweepReport:
    return sweep_layers(loaded, planted_texts().part("search"), grid=GRID, modes=BOTH, top=1, draws=200)


def kl(report: SweepReport, plan: str, language: str) -> float:
    row = next(row for row in report.rows if row.plan == plan)
    return next(d.kl_bits_per_byte.estimate for d in row.damage if d.language == language)


def test_the_planted_layer_is_found_by_both_modes(report: SweepReport) -> None:
    for mode in BOTH:
        ranking = report.rankings[f"{mode} worst"]
        assert isinstance(ranking, Ranking)
        assert ranking.layers[0] == PLANTED_LAYER
        assert ranking.top_probability[0] == 1.0


def test_the_planted_language_is_hurt_most_by_the_planted_layer(report: SweepReport) -> None:
    plan = f"quantize {PLANTED_LAYER}"
    assert kl(report, plan, "he") > 2 * kl(report, plan, "en")
    others = [kl(report, f"quantize {i}", "he") for i in range(LAYERS) if i != PLANTED_LAYER]
    assert kl(report, plan, "he") > 3 * max(others)


def test_an_idle_layer_costs_exactly_nothing(report: SweepReport) -> None:
    scores = report.scores[f"quantize {IDLE_LAYER}"].languages
    assert all(set(row.kl_nats) == {0.0} and set(row.flips) == {0} for row in scores.values())


def test_every_plan_equals_its_naive_evaluation(loaded: LoadedModel, report: SweepReport) -> None:
    texts = planted_texts().part("search")
    for trial in plan_trials(LAYERS, BOTH):
        model = copy.deepcopy(loaded.model)
        for layer in set(range(LAYERS)) - set(trial.protected):
            for name in loaded.linears(layer):
                module = model.get_submodule(name)
                rounded = quantize_rtn(linear_weight(module), GRID, scale_dtype=loaded.storage_dtype)
                set_linear_weight(module, rounded.dequantize())
        states = [fixed_state("base", loaded.model), fixed_state("naive", model)]
        naive = score_states(states, loaded.tokenizer, texts, batch_tokens=64)["naive"]
        for language, row in naive.languages.items():
            mine = report.scores[trial.plan].languages[language]
            assert mine.nll_nats == pytest.approx(row.nll_nats, abs=1e-4), (trial.plan, language)


def test_the_model_is_left_bit_identical_even_after_an_error(loaded: LoadedModel) -> None:
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    pointers = {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    calls = iter(range(100))

    def fail(done: int, total: int) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_layers(loaded, planted_texts().part("search"), grid=GRID, draws=200, progress=fail)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == pointers[name]


def test_the_same_sweep_gives_the_same_bytes(loaded: LoadedModel, report: SweepReport) -> None:
    again = sweep_layers(loaded, planted_texts().part("search"), grid=GRID, modes=BOTH, top=1, draws=200)
    assert to_json(again) == to_json(report)


def test_an_unsupported_language_is_named_and_not_swept(loaded: LoadedModel) -> None:
    texts = planted_texts().part("search")
    strange = tuple(f"ξ{chr(945 + i % 24)}" * 12 for i in range(len(texts)))
    texts = replace(texts, sentences=texts.sentences | {"el": strange})
    report = sweep_layers(loaded, texts, grid=GRID, draws=200)
    assert report.languages["el"] == "unsupported"
    assert "el" not in report.scores["none"].languages
    with pytest.raises(QualityGateError, match="supports none of el"):
        sweep_layers(loaded, texts.choose(["el"]), grid=GRID, reference=None, draws=200)


def test_bytes_are_those_of_the_weights(loaded: LoadedModel) -> None:
    sizes, other = count_bytes(loaded, GRID)
    weights = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32
    assert sizes["fp16"] == (2 * weights,) * LAYERS
    assert sizes["quantized"] == (weights // 2 + 2 * weights // 32,) * LAYERS
    assert other == 2 * (2 * 264 * 32 + 32 * (2 * LAYERS + 1))
