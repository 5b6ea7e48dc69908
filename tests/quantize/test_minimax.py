from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, ProtectionPlan, TextSet
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.minimax import (
    MOST_SENTENCES,
    calibration_damage,
    minimax_weights,
    quantize_calibrated,
    quantize_nearest,
)
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from tests.planning import quantize_layers
from tests.planted_model import planted_texts

GRID = Grid(bits=3, group_size=32)
NOISE = tuple("".join(chr(0x900 + (7 * i + 13 * k) % 110) for k in range(12)) for i in range(60))
"""A "language" that the planted model has never seen."""


@pytest.fixture(scope="module")
def loaded(planted_model: Path) -> LoadedModel:
    return load_model(str(planted_model))


@pytest.fixture(scope="module")
def texts() -> TextSet:
    return planted_texts()


@pytest.fixture
def calibration(loaded: LoadedModel, texts: TextSet) -> CalibrationSet:
    return build_calibration(loaded.tokenizer, texts, weighting="minimax")


class Recorder:
    """Quantizes by rounding, and notes with which weights it was asked to."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.weights: list[dict[str, float]] = []
        self.rounded = 0
        self._loaded = loaded

    def quantize(self, calibration: CalibrationSet) -> QuantizedModel:
        self.weights.append(calibration.shares)
        return replace(quantize_layers(self._loaded, (), method="rtn", grid=GRID), calibration=calibration)

    def nearest(self) -> QuantizedModel:
        self.rounded += 1
        return quantize_nearest(self._loaded, plan_of(self._loaded, GRID))


def plan_of(loaded: LoadedModel, grid: Grid) -> ProtectionPlan:
    return ProtectionPlan.unprotected(loaded.files.name, loaded.layers, grid)


def calibrated(loaded: LoadedModel, calibration: CalibrationSet, texts: TextSet) -> QuantizedModel:
    quantize = partial(quantize_layers, loaded, (), method="gptq", grid=GRID)
    nearest = partial(quantize_nearest, loaded, plan_of(loaded, GRID))
    return quantize_calibrated(lambda given: quantize(calibration=given), nearest, calibration, texts)


def test_weights_follow_damage_and_keep_their_sum() -> None:
    weights = {"en": 0.25, "he": 0.25, "tr": 0.5}
    found = minimax_weights(weights, {"en": 0.1, "he": 0.3}, power=1.0)
    assert found == pytest.approx({"en": 0.125, "he": 0.375, "tr": 0.5}, rel=1e-6)  # 7 significant digits are kept
    assert list(found) == list(weights)
    assert minimax_weights(weights, {"en": 0.1, "he": 0.3}, power=2.0)["he"] == pytest.approx(0.45, rel=1e-6)
    assert minimax_weights(weights, {"en": 0.1, "he": 0.3}, power=0.0) == weights


def test_without_any_damage_the_weights_stay() -> None:
    assert minimax_weights({"en": 0.3, "he": 0.7}, {"en": 0.0, "he": -1e-9}) == {"en": 0.3, "he": 0.7}


def test_the_model_is_quantized_once_by_what_rounding_costs(
    loaded: LoadedModel, texts: TextSet, calibration: CalibrationSet
) -> None:
    recorder = Recorder(loaded)
    found = quantize_calibrated(recorder.quantize, recorder.nearest, calibration, texts)
    few = texts.part("calibrate").take(range(MOST_SENTENCES))
    damage = calibration_damage(quantize_layers(loaded, (), method="rtn", grid=GRID), few)
    assert found.calibration is not None
    assert found.calibration.nearest_kl == damage
    assert recorder.weights == [found.calibration.shares] == [minimax_weights(calibration.shares, damage)]
    assert recorder.rounded == 1
    # The planted model loses several times as much in Hebrew (tests/planted_model.py).
    assert found.calibration.shares["he"] > 2 * found.calibration.shares["en"]


def test_scales_and_channels_that_need_a_calibration_are_left_out_of_the_rounding(loaded: LoadedModel) -> None:
    plan = replace(plan_of(loaded, replace(GRID, clip="minimax")), protect_columns=0.1)
    found = quantize_nearest(loaded, plan)
    expected = quantize_nearest(loaded, plan_of(loaded, replace(GRID, clip="mse")))
    assert not found.columns
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor.integers, found.tensors[name].integers)


def test_damage_is_kl_per_byte_on_the_given_sentences(loaded: LoadedModel, texts: TextSet) -> None:
    quantized = quantize_layers(loaded, (), method="rtn", grid=GRID)
    part = texts.part("calibrate")
    scores = score_states([fixed_state("a", loaded.model), quantized_state("b", quantized)], loaded.tokenizer, part)
    expected = {
        name: sum(own.kl_nats) / math.log(2) / sum(len(s.encode()) for s in part.sentences[name])
        for name, own in scores["b"].languages.items()
    }
    assert calibration_damage(quantized, part) == pytest.approx(expected, rel=1e-6)


def test_a_language_that_the_model_does_not_know_keeps_its_weight(loaded: LoadedModel, texts: TextSet) -> None:
    wider = replace(texts, sentences=texts.sentences | {"hi": NOISE})
    found = calibrated(loaded, build_calibration(loaded.tokenizer, wider, weighting="minimax"), wider).calibration
    assert found is not None
    assert set(found.nearest_kl) == {"en", "he"}
    assert found.shares["hi"] == pytest.approx(1 / 3)
    assert found.shares["he"] > found.shares["en"]
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-6)


def test_a_model_that_supports_no_language_has_no_worst_one(loaded: LoadedModel, texts: TextSet) -> None:
    unknown = replace(texts, sentences={"hi": NOISE})
    calibration = build_calibration(loaded.tokenizer, unknown, weighting="minimax")
    with pytest.raises(QualityGateError, match="16-bit model supports none of hi.*or with uniform weights"):
        calibrated(loaded, calibration, unknown)


def test_sentences_to_choose_or_judge_on_are_never_read(loaded: LoadedModel, texts: TextSet) -> None:
    garbled = {
        name: tuple(text if texts.parts[i] == "calibrate" else "#" * 40 for i, text in enumerate(sentences))
        for name, sentences in texts.sentences.items()
    }
    results = []
    for given in (texts, replace(texts, sentences=garbled)):
        results.append(calibrated(loaded, build_calibration(loaded.tokenizer, given, weighting="minimax"), given))
    assert results[0].calibration == results[1].calibration
    for name, tensor in results[0].tensors.items():
        assert torch.equal(tensor.integers, results[1].tensors[name].integers)


def test_other_weightings_round_nothing(loaded: LoadedModel, texts: TextSet) -> None:
    recorder, uniform = Recorder(loaded), build_calibration(loaded.tokenizer, texts)
    found = quantize_calibrated(recorder.quantize, recorder.nearest, uniform, texts)
    assert found.calibration is uniform
    assert recorder.weights == [uniform.shares]
    assert recorder.rounded == 0
