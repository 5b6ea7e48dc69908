"""What a search for a plan takes, against what its scores and its quantization take alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.forecast.passes import Range
from quant_fairness_plugin.forecast.search import Search, forecast_search
from quant_fairness_plugin.preflight import ModelSource


@pytest.fixture(scope="module")
def quantizer(planted_model: Path, planted_file: str) -> FairQuantizer:
    config = FairConfig(texts=planted_file, group_size=32)
    return FairQuantizer.from_source(ModelSource(str(planted_model)), config)


@pytest.fixture(scope="module")
def search(quantizer: FairQuantizer) -> Search:
    return forecast_search(quantizer.loaded, quantizer.texts, quantizer.config)


def seconds(found: Range | Undefined) -> Range:
    assert isinstance(found, Range)
    return found


def test_fewer_sentences_take_less_and_a_quantization_takes_more(search: Search) -> None:
    few, many = seconds(search.scored(4)), seconds(search.scored(12))
    assert 0 < few.low < many.low
    assert search.least(4, quantizes=False) == few
    assert seconds(search.least(4, quantizes=True)).low > few.low


def test_the_texts_are_counted_as_the_steps_read_them(search: Search, quantizer: FairQuantizer) -> None:
    assert search.run.search.sentences == len(quantizer.texts.part("search"))
    calibration = quantizer.protecting("none").quantize().calibration
    assert calibration is not None
    real = calibration.coverage
    assert search.run.calibrated == pytest.approx(sum(real.values()), rel=0.1)


def test_what_is_not_timed_here_is_undefined(search: Search) -> None:
    elsewhere = Search(search.run, on_cpu=False).least(4, quantizes=True)
    assert isinstance(elsewhere, Undefined)
    assert elsewhere.undefined == "only this machine's CPU is timed beforehand"
