"""`compare` on a tiny planted model, and what `quantize` says about its calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.cli.main import app, run_guarded
from tests.planted_model import PLANTED_LAYER

COMMAND = typer.main.get_command(app)


@pytest.fixture(scope="module")
def common(planted_file: str) -> list[str]:
    return ["--texts", planted_file, "--group-size", "32", "--protect-layers", str(PLANTED_LAYER)]


def test_compare_prints_tables_and_a_verdict_and_saves_the_document(
    planted_model: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison.json"
    arguments = ["compare", "--model", str(planted_model), "--calibrations", "english,uniform", "--matrix", *common]
    assert run_guarded(COMMAND, [*arguments, "-o", str(out)], "quant-fairness") == 0
    printed = capsys.readouterr()
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [row["calibration"] for row in document["outcomes"]] == ["english", "uniform"] * 2
    assert "uniform calibration instead of english" in printed.out
    assert "protection helps under english calibration" in printed.out
    assert "calibrating on the language itself lowers its KL" in printed.out
    worst = document["outcomes"][0]["worst_kl"]["estimate"]
    assert f"{worst:.4f}" in printed.out
    assert "weights english" in printed.err
    assert "  en, he: each 3 rows" in printed.err


def test_compare_prints_the_document_and_nothing_else_as_json(
    planted_model: Path, common: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--model", str(planted_model), "--calibrations", "uniform", *common, "--json"]
    assert run_guarded(COMMAND, arguments, "quant-fairness") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "calibration-comparison"
    assert document["plan"]["units"][f"layers.{PLANTED_LAYER}"] == "fp16"
    assert document["tables"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibrations", "english,english"], "name each one once, of uniform, proportional, english, minimax"),
        (["--calibrations", "fair"], "--calibrations 'fair': name each one once"),
        (["--method", "rtn"], "method 'rtn' uses no calibration text, so there is nothing to compare"),
        (["--langs", "he", "--reference", "none"], "calibration 'english' needs English, which is not among he"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    planted_model: Path,
    common: list[str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = run_guarded(COMMAND, ["compare", "--model", str(planted_model), *common, *arguments], "quant-fairness")
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert message in printed.err


def test_quantize_says_what_it_was_calibrated_on(
    planted_model: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    arguments = ["quantize", str(planted_model), "-o", str(out), *common, "--calibration", "minimax", "--json"]
    assert run_guarded(COMMAND, arguments, "quant-fairness") == 0
    printed = capsys.readouterr()
    made = json.loads(printed.out)["calibration"]
    assert made == json.loads((out / "quant_fairness.json").read_text(encoding="utf-8"))["calibration"]
    assert made["weighting"] == "minimax"
    (en, he), damage = made["weights"].values(), made["nearest_kl"]
    assert en / he == pytest.approx(damage["en"] / damage["he"], rel=1e-5)  # 7 digits are kept of each
    rows, weights = made["rows_per_language"], made["weights"]
    figures = {
        language: f"{rows[language]} rows, {tokens} tokens, weight {weights[language]:.3f}\n"
        for language, tokens in made["tokens_per_language"].items()
    }
    for language, words in figures.items():  # languages of the same figures share a line
        alike = ", ".join(other for other, its in figures.items() if its == words)
        assert f"  {alike}: {words}" in printed.err or f"  {alike}: each {words}" in printed.err, language
