"""`--method legacy`: the research scripts' one-sentence texts are accepted, and what it would ignore is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.preflight import ModelSource, preflight
from tests.planted_model import LAYERS

LEGACY = ["--method", "legacy", "--texts"]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.json"
    path.write_text('{"en": "cedar lamp river", "he": "ארז מנורה נהר"}', encoding="utf-8")
    return str(path)


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), arguments, "quant-fairness")


def test_one_sentence_texts_are_measured_swept_and_recommended(
    planted_model: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(planted_model)]
    assert run("measure", *model, *LEGACY, texts, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert [figure["name"] for figure in measured["disparities"]] == ["D1", "D2", "D3", "D4", "D5", "D6", "max"]
    assert run("sweep", *model, *LEGACY, texts, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert sorted(row["layer"] for row in rows) == list(range(LAYERS))
    assert run("recommend", *model, *LEGACY, texts, "--top", "2") == 0
    assert capsys.readouterr().out.strip() == ",".join(map(str, sorted(row["layer"] for row in rows[:2])))
    assert run("measure", *model, *LEGACY, texts) == 0
    assert "deg(he) / deg(en)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep", "--bits", "3"], "bits"),
        (["sweep", "--combine", "2"], "what to sweep"),
        (["recommend", "--max-overhead", "0.1"], "--max-overhead"),
        (["recommend", "--frontier"], "printed"),
        (["measure", "--part", "search"], "part"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--model", "demo", "--method", "legacy") == 2
    assert named in capsys.readouterr().err


def test_what_the_config_alone_decides_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        preflight(ModelSource("demo-gpt2"), FairConfig(reader="transformers"), out=tmp_path / "out")
    assert preflight(ModelSource("demo-gpt2"), FairConfig(reader="vllm"), out=tmp_path / "out").files.layers
