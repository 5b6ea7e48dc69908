from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision, ProtectionPlan, UnitScores, from_json, to_json
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.model_bank import ModelBank
from quant_fairness_plugin.sweep.sampling import Sampling
from quant_fairness_plugin.sweep.unit_scores import score_units
from tests.planted_model import IDLE_LAYER, PLANTED_LAYER, planted_texts

GRID = Grid(group_size=32)


@pytest.fixture(scope="module")
def loaded(planted_model: Path) -> LoadedModel:
    return load_model(str(planted_model))


@pytest.fixture(scope="module")
def scores(loaded: LoadedModel) -> UnitScores:
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    texts = planted_texts().part("search")
    sampling = Sampling(sentences=4, draws=4)
    return score_units(loaded, texts, grid=GRID, menu=("int8", "fp16"), units=units, bank=bank, sampling=sampling)


def test_the_planted_unit_hurts_its_language_most(scores: UnitScores) -> None:
    assert scores.languages == {"en": "supported", "he": "supported"}
    assert scores.precisions == ("int4", "int8")
    kl = {unit: sum(kinds["int4"]["he"]) for unit, kinds in scores.kl_nats.items()}
    worst = max(kl, key=lambda unit: kl[unit])
    assert worst.startswith(f"layers.{PLANTED_LAYER}.")
    assert sum(scores.kl_nats[worst]["int8"]["he"]) < kl[worst] / 20
    assert all(kl[unit] == 0 for unit in scores.units if unit == f"layers.{IDLE_LAYER}.down")


def test_scores_are_read_back_as_they_were_written(scores: UnitScores) -> None:
    assert from_json(UnitScores, to_json(scores), "scores") == scores


class Nothing:
    """A bank that leaves everything in 16 bit."""

    description = "a bank of nothing"

    def weights(self, unit: str, precision: Precision) -> dict[str, Tensor]:
        return {}


def test_a_bank_that_quantizes_nothing_is_refused(loaded: LoadedModel) -> None:
    texts, units = planted_texts().part("search"), map_units(loaded)
    with pytest.raises(ConfigError, match="a bank of nothing fits no module of the model"):
        score_units(loaded, texts, grid=GRID, menu=("fp16",), units=units, bank=Nothing())


def test_a_quantized_model_is_a_bank_of_its_own_weights(loaded: LoadedModel) -> None:
    units = map_units(loaded)
    quantized = quantize_model(loaded, ProtectionPlan.unprotected("planted", loaded.layers, GRID), method="rtn")
    rounded = RtnBank(loaded, units, GRID)
    bank = ModelBank(units, quantized, rounded)
    for unit in units.group_names():
        for kind in ("int4", "int8"):
            mine, theirs = bank.weights(unit, kind), rounded.weights(unit, kind)
            assert mine.keys() == theirs.keys()
            assert all(value.equal(theirs[name]) for name, value in mine.items())
    assert bank.description == "rtn int4 g32 sym absmax; other precisions: rtn int4 g32 sym absmax"


def test_errors_of_five_bits_are_those_of_the_method_at_the_size_that_rounding_says(loaded: LoadedModel) -> None:
    units, plan = map_units(loaded), ProtectionPlan.unprotected("planted", loaded.layers, GRID)
    calibration = build_calibration(loaded.tokenizer, planted_texts(), row_tokens=64)
    quantized = quantize_model(loaded, plan, method="gptq", calibration=calibration)
    rounded = RtnBank(loaded, units, GRID)
    bank = ModelBank(units, quantized, rounded)
    unit = f"layers.{PLANTED_LAYER}.gate_up"
    made, four, five = bank.weights(unit, "int5"), rounded.weights(unit, "int4"), rounded.weights(unit, "int5")
    assert made.keys() == five.keys()
    for name, value in made.items():
        weight = loaded.model.get_parameter(name).detach()
        solved = quantized.dense_weight(name.removesuffix(".weight")) - weight
        found, ratio = value - weight, (five[name] - weight).norm() / (four[name] - weight).norm()
        assert 0.3 < ratio < 0.7  # half a step is half as large
        assert found.norm() == pytest.approx(float(ratio * solved.norm()), rel=1e-4)
        cosine = (found * solved).sum() / (found.norm() * solved.norm())
        assert cosine == pytest.approx(1, abs=1e-4)
