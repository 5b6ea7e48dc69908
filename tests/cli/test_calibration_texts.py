"""`--calibration-texts` and `--start` from the command line to the record, and what they refuse before the work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import ExportRecord, load
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.preflight import open_documents, open_texts
from quant_fairness_plugin.texts.load import load_texts


def run(*arguments: str | Path) -> int:
    return run_guarded(typer.main.get_command(app), list(map(str, arguments)), "quant-fairness")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    path.write_text("language,text\nen,A text of its own.\nen,And another one.\nhe,טקסט משלו.\n", encoding="utf-8")
    return path


def test_the_record_says_what_was_calibrated_on_and_how_texts_began(
    planted_model: Path, planted_file: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["--texts", planted_file, "--calibration-texts", own, "--start", "plain", "--protect-layers", "none"]
    assert run("quantize", planted_model, "-o", out, *given) == 0
    record = load(ExportRecord, out / "quant_fairness.json")
    assert record.calibration["source"] == "own.csv"
    assert set(record.calibration["tokens_per_language"]) <= {"en", "he"}
    assert list(record.calibration["starts"]) == ["eos", "plain"]
    assert record.measurement is not None
    assert record.measurement.provenance.start == "plain"
    assert "Texts begin with nothing in front" in capsys.readouterr().out


def test_languages_are_calibrated_on_where_they_are_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {name: [f"{name} sentence {i}." for i in range(25)] for name in ("en", "he", "zh")}
    texts, own = tmp_path / "t.json", tmp_path / "own.json"
    texts.write_text(json.dumps({name: columns[name] for name in ("he", "zh")}), encoding="utf-8")
    own.write_text(json.dumps({"en": "One.", "he": "שלום.", "fr": "Un."}), encoding="utf-8")
    config = FairConfig(texts=str(texts), reference=None, calibration_texts=str(own))
    assert open_documents(config, open_texts(config)).languages == ("he",)
    assert "own.json: not calibrated on, as not measured: en, fr" in caplog.text
    assert "own.json has no text in zh: measured, and not calibrated on" in caplog.text
    named = replace(config, languages=("zh", "he"))
    assert open_documents(named, open_texts(named)).languages == ("he",)
    english = replace(config, calibration="english")
    assert open_documents(english, open_texts(english)).languages == ("en", "he")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "chat"], "start 'chat': .* has no chat template"),
        (["--start", "first"], "--start"),
        (["--method", "rtn", "--calibration-texts", "OWN"], "has no effect on method 'rtn'"),
        (["--calibration-texts", "missing.csv"], "no such text set"),
        (["--calibration-texts", "CHATS"], "the conversations of chats.jsonl: .* has no chat template"),
        (["--calibration-texts", "SAME"], "holds 1 of the sentences that .* measures on"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    planted_model: Path, planted_file: str, own: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], options: list[str], message: str,
) -> None:  # fmt: skip
    confirm = load_texts(planted_file).part("confirm").sentences
    language, rows = next(iter(confirm.items()))
    files = {"OWN": own, "CHATS": tmp_path / "chats.jsonl", "SAME": tmp_path / "same.jsonl"}
    chat = [{"role": "user", "content": "Hello."}]
    files["CHATS"].write_text(json.dumps({"language": "en", "messages": chat}) + "\n", encoding="utf-8")
    files["SAME"].write_text(json.dumps({"language": language, "text": rows[0]}) + "\n", encoding="utf-8")
    given = [files.get(option, option) for option in options]
    status = run("quantize", planted_model, "-o", tmp_path / "out", "--texts", planted_file, *given)
    assert status != 0
    assert not (tmp_path / "out").exists()
    err = capsys.readouterr().err
    assert re.search(message, " ".join(err.split())), err
