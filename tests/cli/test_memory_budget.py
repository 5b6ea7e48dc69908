"""`sweep --memory-budget`: the same report from a model that is read layer by layer, and what does not go with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import SweepReport, load
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.model.streamed import StreamedModel
from tests.planted_model import LAYERS, planted_texts


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = planted_texts()
    path = tmp_path_factory.mktemp("texts") / "planted.json"
    few = {language: list(rows[:12]) for language, rows in texts.sentences.items()}
    path.write_text(json.dumps(few, ensure_ascii=False), encoding="utf-8")
    return str(path)


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), list(arguments), "quant-fairness")


def test_the_report_is_that_of_the_model_in_memory(
    planted_model: Path, texts_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["sweep", "--model", str(planted_model), "--texts", texts_file, "--group-size", "32", "--bits", "3"]
    assert run(*asked, "-o", str(tmp_path / "whole.json")) == 0
    read: list[int] = []
    plain = StreamedModel.fetch
    monkeypatch.setattr(StreamedModel, "fetch", lambda self, layer: (read.append(layer), plain(self, layer))[1])
    budget = ["--memory-budget", "4MB", "--work", str(tmp_path / "work")]
    assert run(*asked, *budget, "-o", str(tmp_path / "streamed.json")) == 0
    assert set(read) == set(range(LAYERS))
    whole, ours = (load(SweepReport, tmp_path / f"{name}.json") for name in ("whole", "streamed"))
    assert ours.rankings.keys() == whole.rankings.keys()
    assert ours.provenance == whole.provenance
    for name, state in whole.scores.items():
        for language, own in state.languages.items():
            assert ours.scores[name].languages[language].nll_nats == pytest.approx(own.nll_nats, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--memory-budget", "lots"], 2, "size 'lots' is none; write a number of bytes, or one with KB"),
        (["--memory-budget", "1KB"], 4, "memory budget 1.00 KB: one block in every precision"),
        (["--memory-budget", "1GB", "--executor", "local"], 2, "--memory-budget 1GB and --executor local do not go"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    arguments: list[str], status: int, message: str, tiny_model: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unreadable = Path(shutil.copytree(tiny_model(layers=4), tmp_path / "model"))
    (unreadable / "tokenizer.json").write_text("{}", encoding="utf-8")  # loading it would fail otherwise
    capsys.readouterr()
    assert run("sweep", "--model", str(unreadable), "--group-size", "32", *arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "tokenizer" not in printed.err


def test_a_budget_that_is_too_small_is_refused_without_torch() -> None:
    code = (
        "import sys\nfrom quant_fairness_plugin.cli.main import app, run_guarded\nimport typer\n"
        "arguments = ['sweep', '--model', 'demo', '--memory-budget', '1MB']\n"
        "print(run_guarded(typer.main.get_command(app), arguments, 'quant-fairness'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]
    assert re.search(r"need [0-9.]+ MB; raise the budget to that or more", done.stderr)


def test_quantize_keeps_its_work_and_a_second_run_solves_nothing(
    planted_model: Path, texts_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant_fairness_plugin.quantize.results import StoredResults

    asked = ["quantize", str(planted_model), "--texts", texts_file, "--group-size", "32", "--protect-layers", "none"]
    asked += ["--memory-budget", "100MB", "--work", str(tmp_path / "work")]
    assert run(*asked, "-o", str(tmp_path / "first")) == 0
    monkeypatch.setattr(StoredResults, "add", lambda *given: pytest.fail("solved again"))
    assert run(*asked, "-o", str(tmp_path / "second")) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert run(*asked[:-4], "--memory-budget", "1KB", "-o", str(tmp_path / "third")) == 4
