from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, TextSet
from quant_fairness_plugin.evidence.layer_scores import gradient_scores
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.storage import parameters_sha256
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.fisher import Changes, score_sentences
from tests.planted_model import IDLE_LAYER, LAYERS, PLANTED_LAYER, planted_texts

GRID = Grid(group_size=32)
STEP = 0.05
"""Of the way to the quantized weights. Smaller ones drown: norms are computed in float32 whatever the model's type."""


@pytest.fixture(scope="module")
def loaded(planted_model: Path) -> LoadedModel:
    found = load_model(str(planted_model))
    found.model.double()
    return found


@pytest.fixture(scope="module")
def texts() -> TextSet:
    return planted_texts().part("search").take([0, 3, 5])


def scores(loaded: LoadedModel, texts: TextSet, sentences: int = 16) -> dict[str, tuple[float, ...]]:
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    return gradient_scores(loaded, texts, units=units, bank=bank, precision="int4", sentences=sentences)


def loss(loaded: LoadedModel, text: str) -> float:
    ids = torch.tensor(
        [[loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    logits = loaded.model(ids).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def moved(loaded: LoadedModel, layer: int, text: str, step: float) -> float:
    """The loss where a layer's weights are moved by a share of the way to their quantized values."""
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    names = {
        name: value for group in units.groups for name, value in bank.weights(f"layers.{layer}.{group}", "int4").items()
    }
    kept = {name: loaded.model.get_parameter(name).detach().clone() for name in names}
    with torch.no_grad():
        for name, value in names.items():
            loaded.model.get_parameter(name).add_(step * (value - kept[name]))
        found = loss(loaded, text)
        for name, value in kept.items():
            loaded.model.get_parameter(name).copy_(value)
    return found


def test_the_first_order_is_the_slope_of_the_loss_in_the_worst_language(loaded: LoadedModel, texts: TextSet) -> None:
    found = scores(loaded, texts)["gradient"]
    for layer in range(LAYERS):
        slopes = []
        for language, sentences in texts.sentences.items():
            rise = sum(
                (moved(loaded, layer, text, STEP) - moved(loaded, layer, text, -STEP)) / (2 * STEP)
                for text in sentences
            )
            slopes.append(abs(rise) / sum(len(text.encode()) for text in texts.sentences[language]))
        # What a central difference over a tenth of the way leaves out, and float32 norms add.
        assert found[layer] == pytest.approx(max(slopes), rel=0.02, abs=1e-6)


def test_the_second_order_is_the_sum_of_the_units_scores(loaded: LoadedModel, texts: TextSet) -> None:
    units = map_units(loaded)
    changes = Changes.of(loaded, units, RtnBank(loaded, units, GRID), ["int4"])
    by_unit, bytes_ = score_sentences(loaded, texts, changes)
    found = scores(loaded, texts)["fisher"]
    for layer in range(LAYERS):
        inside = [figures["int4"] for unit, figures in by_unit.items() if unit.startswith(f"layers.{layer}.")]
        sums = [sum(sum(figures[tag]) for figures in inside) / sum(bytes_[tag]) for tag in texts.languages]
        assert found[layer] == pytest.approx(max(sums), rel=1e-6, abs=1e-15)


def test_the_planted_layer_has_the_highest_scores_and_an_idle_one_none(loaded: LoadedModel, texts: TextSet) -> None:
    for values in scores(loaded, texts).values():
        others = [values[layer] for layer in range(LAYERS) if layer != PLANTED_LAYER]
        assert values[PLANTED_LAYER] > 3 * max(others)  # 4.5 times by first order, 13.7 by second
        assert values[IDLE_LAYER] == 0.0  # its outputs are zero: no change, and no gradient behind them


def test_only_so_many_sentences_are_read(loaded: LoadedModel, texts: TextSet) -> None:
    assert scores(loaded, texts, sentences=1) == scores(loaded, texts.take([0]))
    assert scores(loaded, texts, sentences=1) != scores(loaded, texts)


def test_the_model_is_left_as_it_was(loaded: LoadedModel, texts: TextSet) -> None:
    before = parameters_sha256(loaded.model)
    scores(loaded, texts)
    assert parameters_sha256(loaded.model) == before
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
