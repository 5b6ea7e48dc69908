from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, TextSet
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.quantize import minimax
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.minimax import (
    calibration_damage,
    quantize_calibrated,
    quantize_minimax,
    raised_weights,
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
    """Quantizes by rounding, and pretends that each round's damage is what a script says."""

    def __init__(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, script: list[dict[str, float]]) -> None:
        self.weights: list[dict[str, float]] = []
        self.models: list[QuantizedModel] = []
        self._loaded, self._script = loaded, script
        monkeypatch.setattr(minimax, "calibration_damage", self.damage)

    def __call__(self, calibration: CalibrationSet) -> QuantizedModel:
        self.weights.append(calibration.shares)
        self.models.append(replace(quantize_layers(self._loaded, (), method="rtn", grid=GRID), calibration=calibration))
        return self.models[-1]

    def damage(self, quantized: QuantizedModel, part: TextSet) -> dict[str, float]:
        assert set(part.parts) == {"calibrate"}
        return self._script[len(self.models) - 1]


def test_weights_grow_with_damage_and_keep_their_sum() -> None:
    weights = {"en": 0.25, "he": 0.25, "tr": 0.5}
    raised = raised_weights(weights, {"en": 0.1, "he": 0.2}, step=1.0)
    grown = {"en": 0.25 * math.exp(0.5), "he": 0.25 * math.exp(1.0)}
    expected = {name: 0.5 * value / sum(grown.values()) for name, value in grown.items()}
    assert raised == pytest.approx(expected | {"tr": 0.5}, rel=1e-6)  # 7 significant digits are kept
    assert list(raised) == list(weights)


def test_without_any_damage_the_weights_stay() -> None:
    assert raised_weights({"en": 0.3, "he": 0.7}, {"en": 0.0, "he": 0.0}, step=1.0) == {"en": 0.3, "he": 0.7}


def test_the_best_round_is_kept_and_two_without_improvement_end_it(
    loaded: LoadedModel, texts: TextSet, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [{"en": 0.1, "he": 0.4}, {"en": 0.2, "he": 0.3}, {"en": 0.31, "he": 0.2}, {"en": 0.3, "he": 0.3}, {}]
    recorder = Recorder(loaded, monkeypatch, script)
    found = quantize_minimax(recorder, calibration, texts)
    assert [tried.kl_bits_per_byte for tried in found.calibration.rounds] == script[:4]  # type: ignore[union-attr]
    assert found.tensors is recorder.models[1].tensors
    assert found.calibration is not None
    assert found.calibration.shares == recorder.weights[1]
    assert [tried.weights for tried in found.calibration.rounds] == recorder.weights
    assert recorder.weights[0] == calibration.shares
    for index in range(3):
        assert recorder.weights[index + 1] == raised_weights(recorder.weights[index], script[index], step=1.0)


def test_rounds_are_bounded(
    loaded: LoadedModel, texts: TextSet, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(loaded, monkeypatch, [{"en": 0.1, "he": 1 / (1 + n)} for n in range(20)])
    found = quantize_minimax(recorder, calibration, texts)
    assert len(recorder.models) == minimax.ROUNDS == 6
    assert found.tensors is recorder.models[-1].tensors


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
    calibration = build_calibration(loaded.tokenizer, wider, weighting="minimax")
    quantize = partial(quantize_layers, loaded, (), method="gptq", grid=GRID)
    found = quantize_minimax(lambda given: quantize(calibration=given), calibration, wider, rounds=2)
    assert found.calibration is not None
    first, second = found.calibration.rounds
    assert set(first.kl_bits_per_byte) == {"en", "he"}
    assert second.weights["hi"] == first.weights["hi"] == pytest.approx(1 / 3)
    assert second.weights["he"] > second.weights["en"]  # five times the damage, of which twice the weight is made
    assert sum(second.weights.values()) == pytest.approx(1, abs=1e-6)


def test_a_model_that_supports_no_language_has_no_worst_one(loaded: LoadedModel, texts: TextSet) -> None:
    unknown = replace(texts, sentences={"hi": NOISE})
    calibration = build_calibration(loaded.tokenizer, unknown, weighting="minimax")
    quantize = partial(quantize_layers, loaded, (), method="gptq", grid=GRID)
    with pytest.raises(QualityGateError, match="16-bit model supports none of hi.*or with uniform weights"):
        quantize_minimax(lambda given: quantize(calibration=given), calibration, unknown)


def test_sentences_to_choose_or_judge_on_are_never_read(loaded: LoadedModel, texts: TextSet) -> None:
    garbled = {
        name: tuple(text if texts.parts[i] == "calibrate" else "#" * 40 for i, text in enumerate(sentences))
        for name, sentences in texts.sentences.items()
    }
    results = []
    for given in (texts, replace(texts, sentences=garbled)):
        calibration = build_calibration(loaded.tokenizer, given, weighting="minimax")
        quantize = partial(quantize_layers, loaded, (), method="gptq", grid=GRID)
        results.append(quantize_minimax(lambda c, run=quantize: run(calibration=c), calibration, given, rounds=2))
    assert results[0].calibration == results[1].calibration
    for name, tensor in results[0].tensors.items():
        assert torch.equal(tensor.integers, results[1].tensors[name].integers)


def test_other_weightings_quantize_once(
    loaded: LoadedModel, texts: TextSet, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(loaded, monkeypatch, [{"en": 0.1, "he": 0.4}] * 9)
    uniform = build_calibration(loaded.tokenizer, texts)
    assert quantize_calibrated(recorder, uniform, texts) is recorder.models[0]
    assert len(recorder.models) == 1
    quantize_calibrated(recorder, calibration, texts)
    assert len(recorder.models) == 1 + 3


def test_no_rounds_or_no_step_are_errors(loaded: LoadedModel, texts: TextSet, calibration: CalibrationSet) -> None:
    quantize = partial(quantize_layers, loaded, (), method="gptq", grid=GRID)
    for chosen in ({"rounds": 0}, {"step": 0.0}):
        with pytest.raises(ConfigError, match="use at least 1 round and a step above 0"):
            quantize_minimax(lambda given: quantize(calibration=given), calibration, texts, **chosen)  # type: ignore[arg-type] # one of the two
