"""What `--method legacy` measures, the order of layers without a disparity, and the precision of measurements."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.seeds import layer_sweep, measure_disparity, quick_sweep, simulate_int4, sweeps
from quant_fairness_plugin.seeds.disparity import DISPARITY_FORMULAS, perplexities
from quant_fairness_plugin.seeds.legacy import LegacyLanguage, legacy_disparities, legacy_texts, measure_legacy
from quant_fairness_plugin.seeds.texts import DEFAULT_TEXTS
from tests.planted_model import LAYERS, planted_texts

ONE_TEXT = {"en": "cedar lamp river stone", "he": "ארז מנורה נהר אבן"}


def test_layers_without_a_disparity_come_last_in_their_order(
    planted_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(str(planted_model))
    # Before, and after quantizing all but layer 0, 1, …: the reference loses nothing where a layer has no disparity.
    after = [(10.0, 12.0), (11.0, 13.0), (10.0, 12.0), (12.0, 13.0)]
    figures = iter([(10.0, 10.0), *after] * 2)
    monkeypatch.setattr(sweeps, "perplexities", lambda *_: dict(zip(ONE_TEXT, next(figures), strict=True)))
    rows = layer_sweep(loaded.model, loaded.tokenizer, ONE_TEXT, method="legacy")
    assert isinstance(rows, tuple)
    assert [row.layer for row in rows] == [3, 1, 0, 2]
    assert quick_sweep(loaded.model, loaded.tokenizer, ONE_TEXT, 3, method="legacy") == [0, 1, 3]
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [0]


def test_a_half_precision_model_is_measured_in_float32(planted_model: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(planted_model, dtype=torch.float16).eval()
    tokenizer = AutoTokenizer.from_pretrained(planted_model)
    simulate_int4(half, protect_layers={1})
    results = [measure_disparity(model, tokenizer, planted_texts()) for model in (half, copy.deepcopy(half).float())]
    first, second = (result.measurement for result in results)
    assert half.dtype == torch.float16
    assert not isinstance(first, Undefined)
    assert not isinstance(second, Undefined)
    assert first.languages == second.languages  # float16 arithmetic changes the fourth digit


def test_the_simulation_is_measured_as_the_scripts_do(planted_model: Path) -> None:
    loaded = load_model(str(planted_model))
    original = copy.deepcopy(loaded.model.state_dict())
    measured = measure_legacy(loaded, ONE_TEXT, "en")
    assert all(torch.equal(value, original[name]) for name, value in loaded.model.state_dict().items())
    before = perplexities(loaded.model, loaded.tokenizer, ONE_TEXT)
    simulate_int4(loaded.model)
    after = perplexities(loaded.model, loaded.tokenizer, ONE_TEXT)
    change = {name: (after[name] / before[name] - 1) * 100 for name in ONE_TEXT}
    assert {row.language: row.degradation for row in measured.languages} == pytest.approx(change)
    relative = change["he"] / change["en"]
    english, hebrew = measured.languages
    assert (hebrew.script, hebrew.relative) == ("Hebrew", pytest.approx(relative))
    assert (english.label, hebrew.label == "NEEDS WORK") == ("Reference", relative >= 2)
    found = {figure.name: figure.value for figure in measured.disparities}
    assert list(found) == list(DISPARITY_FORMULAS)
    assert found["D1"] == pytest.approx(change["he"] / change["en"])
    assert found["D4"] == pytest.approx(abs(change["he"] - change["en"]))
    lost = {name: 100 - 100 * before[name] / after[name] for name in ONE_TEXT}
    assert found["D5"] == pytest.approx(lost["he"] / lost["en"])


def test_an_infinite_perplexity_leaves_every_disparity_undefined() -> None:
    infinite = Undefined("infinite in float32")
    rows = (
        LegacyLanguage("en", 3.0, 6.0, 100.0, "Latin", 1.0, "Reference"),
        LegacyLanguage("he", 2.0, infinite, infinite, "Hebrew", infinite, "undefined"),
    )
    figures = legacy_disparities(rows, "en")
    assert all(isinstance(f.value, Undefined) and f.value.undefined.startswith("the perplexity of he") for f in figures)


def test_texts_are_one_sentence_a_language(tmp_path: Path) -> None:
    assert legacy_texts(FairConfig(languages=("en", "ko"))) == {name: DEFAULT_TEXTS[name] for name in ("en", "ko")}
    assert list(legacy_texts(FairConfig())) == ["en", "he", "ar", "zh"]
    assert legacy_texts(FairConfig(texts=_file(tmp_path, {"en": "Fox.", "he": ["שועל."]}))) == {
        "en": "Fox.",
        "he": "שועל.",
    }
    with pytest.raises(ConfigError, match="2 sentences a language; --method legacy takes one"):
        legacy_texts(FairConfig(texts=_file(tmp_path, {"en": ["Fox.", "Lamp."], "he": ["a", "b"]})))
    with pytest.raises(UnknownLanguageError, match="fi"):
        legacy_texts(FairConfig(languages=("en", "fi")))
    with pytest.raises(ConfigError, match="ratios to a language"):
        legacy_texts(FairConfig(reference=None))


def _file(folder: Path, texts: Mapping[str, object]) -> str:
    path = folder / "texts.json"
    path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    return str(path)


def test_every_layer_is_swept(planted_model: Path) -> None:
    loaded = load_model(str(planted_model))
    assert len(quick_sweep(loaded.model, loaded.tokenizer, ONE_TEXT, LAYERS, method="legacy")) == LAYERS
