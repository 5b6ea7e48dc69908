"""The calls of the research scripts, with their signatures and in-place behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import quant_fairness
import quant_fairness_plugin
from quant_fairness import (
    fair_quantize,
    layer_sweep,
    measure_disparity,
    protect_layers,
    quantize_except,
    quick_sweep,
    simulate_int4,
    undo_simulation,
)
from quant_fairness_plugin.artifacts import Grid, SweepReport, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.seeds import LegacySweepRow
from quant_fairness_plugin.seeds.disparity import disparity, perplexities
from tests.planted_model import LAYERS, PLANTED_LAYER, planted_texts

GRID = Grid(group_size=32)
ONE_TEXT = {"en": "cedar lamp river stone", "he": "ארז מנורה נהר אבן"}


@pytest.fixture(scope="module")
def pair(planted_model: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(planted_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(planted_model)


@pytest.fixture(autouse=True)
def _same_model_afterwards(pair: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[None]:
    before = {name: parameter.clone() for name, parameter in pair[0].named_parameters()}
    yield
    for name, parameter in pair[0].named_parameters():
        assert torch.equal(parameter, before[name]), name


Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_both_names_give_the_same_calls() -> None:
    for name in quant_fairness_plugin.__all__:
        assert getattr(quant_fairness, name) is getattr(quant_fairness_plugin, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        quant_fairness.nothing  # noqa: B018 # the access is the test


def test_quick_sweep_returns_ascending_integers(pair: Pair) -> None:
    layers = quick_sweep(*pair, planted_texts(), top_n=2, grid=GRID)
    assert layers == sorted(layers)
    assert len(layers) == 2
    assert all(type(layer) is int and 0 <= layer < LAYERS for layer in layers)


def test_layer_sweep_is_rigorous_unless_told_otherwise(pair: Pair) -> None:
    assert isinstance(layer_sweep(*pair, planted_texts(), grid=GRID), SweepReport)
    with pytest.raises(ConfigError, match="too little to measure"):
        layer_sweep(*pair, ONE_TEXT)


def test_a_legacy_sweep_is_the_seeds_loop(pair: Pair) -> None:
    model, tokenizer = pair
    rows = layer_sweep(model, tokenizer, ONE_TEXT, method="legacy")
    assert not isinstance(rows, SweepReport)
    base = perplexities(model, tokenizer, ONE_TEXT)
    for row in rows:
        simulate_int4(model, protect_layers={row.layer})
        after = perplexities(model, tokenizer, ONE_TEXT)
        undo_simulation(model)
        change = {lang: (after[lang] - base[lang]) / base[lang] * 100 for lang in ONE_TEXT}
        assert row == LegacySweepRow(row.layer, disparity("D1", change), change)
    numbers = [row.disparity for row in rows if not isinstance(row.disparity, Undefined)]
    assert numbers == sorted(numbers)
    assert sorted(row.layer for row in rows) == list(range(LAYERS))


def test_measure_disparity_uses_the_weights_that_the_model_remembers(pair: Pair) -> None:
    model, tokenizer = pair
    simulate_int4(model, protect_layers={PLANTED_LAYER})
    try:
        result = measure_disparity(model, tokenizer, planted_texts())
        legacy = measure_disparity(model, tokenizer, ONE_TEXT, method="legacy")
    finally:
        undo_simulation(model)
    assert not isinstance(result.measurement, Undefined)
    assert {row.language for row in result.measurement.languages} == set(ONE_TEXT)
    assert isinstance(legacy.measurement, Undefined)
    assert not isinstance(legacy.degradation, Undefined)


def test_without_a_simulation_disparity_is_undefined(pair: Pair) -> None:
    result = measure_disparity(*pair)
    for value in (result.degradation, result.average_disparity, result.max_disparity, result.measurement):
        assert isinstance(value, Undefined)
        assert "simulate_int4" in value.undefined


def test_a_baseline_of_perplexities_serves_the_legacy_measure_only(pair: Pair) -> None:
    base = perplexities(*pair, ONE_TEXT)
    result = measure_disparity(*pair, ONE_TEXT, base, method="legacy")
    assert result.degradation == {"en": 0.0, "he": 0.0}
    assert isinstance(result.average_disparity, Undefined)
    with pytest.raises(ConfigError, match='only be used with method="legacy"'):
        measure_disparity(*pair, planted_texts(), base)


@pytest.mark.parametrize(("target", "layers"), [(0.9, (0, LAYERS - 1)), (0.5, (0, int(0.75 * LAYERS)))])
def test_fair_quantize_is_the_seeds_rule(pair: Pair, target: float, layers: tuple[int, ...]) -> None:
    model, _ = pair
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    try:
        assert fair_quantize(model, disparity_target=target) == tuple(sorted({*layers, LAYERS - 1}))
        kept = [i for i in range(LAYERS) if _same(model, before, i)]
    finally:
        undo_simulation(model)
    assert kept == sorted({*layers, LAYERS - 1})


def test_registered_layers_are_honoured_later(pair: Pair) -> None:
    model, _ = pair
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    try:
        protect_layers(model, [2])
        quantize_except(model, [0])
        assert [i for i in range(LAYERS) if _same(model, before, i)] == [0, 2]
    finally:
        undo_simulation(model)
        protect_layers(model, [])


def test_a_simulated_model_is_not_swept(pair: Pair) -> None:
    model, tokenizer = pair
    simulate_int4(model)
    try:
        with pytest.raises(ConfigError, match="undo_simulation"):
            layer_sweep(model, tokenizer, planted_texts())
    finally:
        undo_simulation(model)


def _same(model: PreTrainedModel, before: dict[str, torch.Tensor], layer: int) -> bool:
    own = {n: p for n, p in model.named_parameters() if f"layers.{layer}." in n and "_proj.weight" in n}
    return all(torch.equal(parameter, before[name]) for name, parameter in own.items())
