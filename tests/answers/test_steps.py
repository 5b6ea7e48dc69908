"""A checkpoint that is measured is asked, in the languages that the 16-bit model knows; else it is said why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin import steps
from quant_fairness_plugin.artifacts import Answers, ExportRecord, Undefined, load, save
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.measure.scoring import fixed_state
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.quantize.workplace import Workplace


@pytest.fixture(scope="module")
def quantizer(planted_model: Path, planted_file: str) -> FairQuantizer:
    config = FairConfig(texts=planted_file, group_size=32, method="rtn", bits=4, protect_layers="none")
    return FairQuantizer.from_source(ModelSource(str(planted_model)), config)


@pytest.fixture(scope="module")
def record(quantizer: FairQuantizer, tmp_path_factory: pytest.TempPathFactory) -> ExportRecord:
    return quantizer.save_pretrained(tmp_path_factory.mktemp("asked") / "out")


def answers(record: ExportRecord) -> Answers:
    assert record.measurement is not None
    found = record.measurement.answers
    assert isinstance(found, Answers)
    return found


def test_the_record_holds_what_both_models_say_and_comes_back_from_its_file(
    record: ExportRecord, tmp_path: Path
) -> None:
    found = answers(record)
    assert (found.source, found.prompts, found.chat_template, found.dtype) == ("bundled", 3, False, "float32")
    assert [row.language for row in found.languages] == ["en", "he"]
    assert all(answer.sixteen_bit and answer.checkpoint for row in found.languages for answer in row.answers)
    save(record, tmp_path / "record.json")
    assert load(ExportRecord, tmp_path / "record.json") == record


def test_a_model_that_stays_in_its_files_gives_the_same_answers(
    planted_model: Path,
    quantizer: FairQuantizer,
    record: ExportRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.model.load.load_model", None)  # nothing is loaded as a whole
    streamed = FairQuantizer.from_source(ModelSource(str(planted_model)), quantizer.config, stream=True)
    assert answers(streamed.save_pretrained(tmp_path / "out")) == answers(record)
    budget = Workplace(memory_budget=1 << 26)
    budgeted = FairQuantizer.from_source(ModelSource(str(planted_model)), quantizer.config, place=budget)
    assert answers(budgeted.save_pretrained(tmp_path / "budgeted")) == answers(record)


def test_what_is_not_asked_is_said_with_its_reason(
    planted_model: Path, quantizer: FairQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(config: FairConfig, place: Workplace | None = None, *, stream: bool = False) -> str:
        other = FairQuantizer.from_source(ModelSource(str(planted_model)), config, place=place, stream=stream)
        measurement = other.save_pretrained(tmp_path / "out", overwrite=True).measurement
        assert measurement is not None
        assert isinstance(measurement.answers, Undefined)
        return measurement.answers.undefined

    config = quantizer.config
    assert reason(replace(config, prompts="none")) == "--prompts none"
    monkeypatch.setattr("quant_fairness_plugin.steps.answers.EXPECTED_TOKENS", 1 << 20)
    assert reason(config, Workplace(memory_budget=1 << 26)).startswith("keys and values of 6 prompts take up to ")


def test_a_language_that_the_16_bit_model_does_not_know_is_not_asked(
    quantizer: FairQuantizer, record: ExportRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record.measurement is not None
    first, second = record.measurement.languages
    unknown = replace(record.measurement, languages=(first, replace(second, status="unsupported")))
    state = fixed_state("exported", quantizer.loaded.model)
    found = steps.ask(quantizer.loaded, Path(), state, unknown, quantizer.config, progress=lambda *_: None)
    assert isinstance(found, Answers)
    assert [row.language for row in found.languages] == ["en"]
    assert found.not_asked == {"he": "the 16-bit model does not know it"}
    assert all(answer.sixteen_bit == answer.checkpoint for answer in found.languages[0].answers)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr("quant_fairness_plugin.steps.answers.write_answers", fail)
    lost = steps.ask(quantizer.loaded, Path(), state, unknown, quantizer.config, progress=lambda *_: None)
    assert lost == Undefined("RuntimeError: no such kernel")  # and the checkpoint is not lost over it
