"""`analyze`: one document on stdout, tables from the fields of the answer, and a list of the questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from rich.table import Table

from quant_fairness_plugin.analysis.kinds import ANALYSES
from quant_fairness_plugin.artifacts import Interval, Number, Undefined, save
from quant_fairness_plugin.cli.analyze import lines
from quant_fairness_plugin.cli.main import app, run_guarded
from tests.planted import planted_report


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), ["analyze", *arguments], "quant-fairness")


def test_the_questions_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ANALYSES)
    assert run("--list", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == list(ANALYSES)


def test_an_answer_is_one_document(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_model("llama", layers=3)), tmp_path / "weights.json"
    assert run("weights", model, "--json", "-o", str(out)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text(encoding="utf-8"))
    assert document["analysis"] == "weights"
    assert "text_set" not in document["provenance"]
    assert [row["layer"] for row in document["result"]["layers"]] == [0, 1, 2]
    assert run("weights", model) == 0
    assert "share of largest" in capsys.readouterr().out


def test_saved_sweeps_are_compared_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, benefit in (("a", [3.0, 1.0, 0.5, 2.0, 2.5]), ("b", [2.0, 0.4, 1.5, 3.0])):
        report = planted_report(benefit, noise=0.01)
        save(replace(report, provenance=replace(report.provenance, model=name)), tmp_path / f"{name}.json")
    sweeps, out = f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}", tmp_path / "depth.json"
    assert run("depth", "--sweep", sweeps, "--json", "-o", str(out)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["provenance"]["arguments"] == {"sweep": ["a.json", "b.json"]}
    assert not {"model", "model_sha256", "device"} & document["provenance"].keys()
    assert [(row["first"], row["second"]) for row in document["result"]["pairs"]] == [("a", "b")]
    assert "several models" in out.with_suffix(".html").read_text(encoding="utf-8")
    assert run("depth", "--sweep", sweeps) == 0
    assert "among first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probing", "demo"], "there is no analysis 'probing'"),
        (["weights"], "no model given"),
        (["weights", "demo", "--gold", "x.tsv"], "does nothing with --gold"),
        (["depth", "demo"], "analyze depth reads saved files and takes no model; leave demo out"),
        (["depth", "--sweep", "x.json"], "1 sweep(s) given"),
    ],
)
def test_a_wrong_question_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@dataclass(frozen=True)
class Row:
    language: str
    value: Number
    sums: dict[str, float]


@dataclass(frozen=True)
class Answer:
    verdict: str
    rows: tuple[Row, ...]
    nothing: tuple[Row, ...] = ()


def test_tables_are_made_of_fields_without_sums_by_sentence() -> None:
    rows = (Row("en", Interval(1.0, 0.5, 2.0), {"s1": 3.0}), Row("he", Undefined("no text"), {}))
    verdict, table = lines(Answer("yes", rows))
    assert verdict == "verdict: yes"
    assert isinstance(table, Table)
    assert [column.header for column in table.columns] == ["language", "value"]
    assert list(table.columns[1].cells) == ["1 [0.5, 2]", "undefined"]
    assert table.caption == "undefined: no text"
