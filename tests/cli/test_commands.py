"""Commands on a tiny trained model: stdout is the result and nothing else, and artefacts are picked up again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import Combinations, ProtectionPlan, SweepReport, load
from quant_fairness_plugin.cli.main import app, run_guarded
from tests.planted_model import LAYERS, planted_texts


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = planted_texts()
    path = tmp_path_factory.mktemp("texts") / "planted.jsonl"
    rows = [
        {"id": texts.ids[i], "part": texts.parts[i]} | {lang: rows[i] for lang, rows in texts.sentences.items()}
        for i in range(len(texts))
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_sweep_is_one_document_and_recommend_reads_it_without_a_model(
    planted_model: Path, texts_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = typer.main.get_command(app), tmp_path / "sweep.json"
    arguments = ["sweep", "--model", str(planted_model), "--texts", texts_file, "--group-size", "32"]
    assert run_guarded(command, [*arguments, "--top", "1", "--json", "-o", str(out)], "quant-fairness") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.read_text(encoding="utf-8"))
    assert load(SweepReport, out).layers == LAYERS
    assert json.loads((tmp_path / "sweep.run.json").read_text(encoding="utf-8"))["argv"] == sys.argv

    assert run_guarded(command, ["recommend", str(out), "--top", "2"], "quant-fairness") == 0
    indices = capsys.readouterr().out
    assert len(indices.strip().split(",")) == 2
    assert all(0 <= int(index) < LAYERS for index in indices.split(","))

    assert run_guarded(command, ["recommend", str(out), "--max-overhead", "0.01"], "quant-fairness") == 0
    nothing = capsys.readouterr()
    assert nothing.out == ""
    assert "one layer costs more than the budget" in nothing.err


def test_pairs_of_units_are_swept_and_recommended(
    planted_model: Path, texts_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out, plan = typer.main.get_command(app), tmp_path / "sweep.json", tmp_path / "plan.json"
    arguments = ["sweep", "--model", str(planted_model), "--texts", texts_file, "--group-size", "32", "-o", str(out)]
    options = ["--granularity", "unit", "--combine", "2", "--max-plans", "6", "--top", "5"]
    assert run_guarded(command, [*arguments, *options, "--json"], "quant-fairness") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.read_text(encoding="utf-8"))
    assert "pairs: 6 of 120 evaluated, of the units that count most by themselves; best to protect: " in printed.err
    report = load(SweepReport, out)
    assert report.granularity == "unit"
    assert report.combinations[2] == Combinations(evaluated=6, possible=120)

    assert run_guarded(command, ["recommend", str(out), "--top", "5", "-o", str(plan)], "quant-fairness") == 0
    units = capsys.readouterr().out.strip()
    assert tuple(units.split(",")) == tuple(
        unit.removeprefix("layers.") for unit in load(ProtectionPlan, plan).overrides
    )
    assert len(units.split(",")) == 5

    folder = ["quantize", str(planted_model), "-o", str(tmp_path / "checkpoint"), "--texts", texts_file]
    options = ["--group-size", "32", "--method", "rtn", "--protect-layers", "none", "--protect-units", units]
    assert run_guarded(command, [*folder, *options], "quant-fairness") == 0
    assert "in 16 bit" in capsys.readouterr().out


def test_a_sweep_in_words_says_how_many_pairs_there_were(
    planted_model: Path, texts_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "--model", str(planted_model), "--texts", texts_file, "--group-size", "32", "--combine", "2"]
    assert run_guarded(typer.main.get_command(app), arguments, "quant-fairness") == 0
    printed = capsys.readouterr().out
    assert "single: 4 of 4 evaluated\n" in printed
    assert "pairs: 6 of 6 evaluated; best to protect: " in printed
    assert "protect-one, most worth protecting first: 2," in printed
    assert "protect 0+2" in printed
