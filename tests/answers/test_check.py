"""Prompts that a model cannot answer are refused by its tokenizer alone, before the model is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quant_fairness_plugin.answers.check import check_prompts
from quant_fairness_plugin.answers.prompts import NEW_TOKENS, load_prompts
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.preflight import ModelSource, preflight
from tests.tiny import byte_tokenizer


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight can be read."""
    for name in ("load_model", "open_streamed"):
        monkeypatch.setattr(f"quant_fairness_plugin.steps.opening.{name}", None)


@pytest.fixture
def refusing(planted_model: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(planted_model, tmp_path / "refusing")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system\nfirst') }}", encoding="utf-8")
    return folder


def write(path: Path, **columns: str) -> str:
    path.write_text(json.dumps(columns), encoding="utf-8")
    return str(path)


def test_the_limit_counts_the_prompt_and_its_answer(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path / "p.json", en="abcdefgh", he="שלו"))
    assert prompts is not None
    check_prompts(prompts, ["en", "he"], byte_tokenizer(), limit=8 + NEW_TOKENS, name="m")
    expected = (
        rf"p\.json: the prompt 'abcdefgh' \(en\) has 8 tokens, and m takes {7 + NEW_TOKENS}, of which {NEW_TOKENS} are "
        r"for the answer; accepted are 7\. Shorten it; --prompts none asks nothing"
    )
    with pytest.raises(ConfigError, match=expected):
        check_prompts(prompts, ["he", "en"], byte_tokenizer(), limit=7 + NEW_TOKENS, name="m")


@pytest.mark.usefixtures("unread")
def test_a_prompt_that_is_too_long_is_refused_before_the_model_is_read(
    planted_model: Path, planted_file: str, tmp_path: Path
) -> None:
    config = FairConfig(texts=planted_file, prompts=write(tmp_path / "long.json", he="שלום", en="word " * 2000))
    with pytest.raises(ConfigError, match=r"^long\.json: the prompt 'word .* \(en\) has \d+ tokens, and planted takes"):
        FairQuantizer.from_source(ModelSource(str(planted_model)), config)


@pytest.mark.usefixtures("unread")
def test_a_prompt_that_the_template_refuses_is_refused_before_the_model_is_read(
    refusing: Path, planted_file: str, tmp_path: Path
) -> None:
    config = FairConfig(texts=planted_file, prompts=write(tmp_path / "p.json", en="Hello?"))
    expected = (
        r"^p\.json: the prompt 'Hello\?' \(en\): a conversation of user is refused by the chat template "
        r"\(system first\)"
    )
    with pytest.raises(ConfigError, match=expected) as caught:
        FairQuantizer.from_source(ModelSource(str(refusing)), config)
    assert "\n" not in str(caught.value)


def test_bundled_prompts_that_the_template_refuses_are_said_before_the_work_and_in_the_result(
    refusing: Path, planted_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = FairConfig(texts=planted_file, group_size=32, method="rtn", protect_layers="none")
    quantizer = FairQuantizer.from_source(ModelSource(str(refusing)), config)
    assert "no prompts will be asked: bundled: the prompt " in caplog.text
    caplog.clear()
    record = quantizer.save_pretrained(tmp_path / "out")
    assert record.measurement is not None
    reason = str(getattr(record.measurement.answers, "undefined", ""))
    assert reason.startswith("a conversation of user is refused by the chat template")
    assert "the checkpoint of refusing was asked no prompts: a conversation" in caplog.text
    assert "ConfigError" not in caplog.text
    assert str(tmp_path / "out") not in caplog.text


def test_prompts_in_no_measured_language_are_refused_in_the_first_second(planted_file: str, tmp_path: Path) -> None:
    config = FairConfig(texts=planted_file, prompts=write(tmp_path / "russian.json", ru="Кто ты?"))
    with pytest.raises(ConfigError, match=r"russian\.json has prompts in ru, and none in en, he, which are measured"):
        preflight(ModelSource("demo"), config)
