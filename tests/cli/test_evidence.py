"""`recommend --verify`: what it prints, what it saves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import Evidence, ProtectionPlan, load
from quant_fairness_plugin.cli.main import app, run_guarded
from tests.planted_model import LAYERS, PLANTED_LAYER


def run(*arguments: str | Path) -> int:
    return run_guarded(typer.main.get_command(app), list(map(str, arguments)), "quant-fairness")


@pytest.fixture(scope="module")
def swept(planted_model: Path, planted_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = tmp_path_factory.mktemp("swept") / "sweep.json"
    assert (
        run("sweep", "--model", planted_model, "--texts", planted_file, "--group-size", "32", "-o", report, "--json")
        == 0
    )
    return report


def test_a_verified_plan_is_judged_on_other_sentences_and_says_so(
    swept: Path, planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, evidence = tmp_path / "plan.json", tmp_path / "evidence.json"
    given = ["recommend", swept, "--top", "1", "--model", planted_model, "--texts", planted_file]
    assert run(*given, "--verify", "--evidence", evidence, "-o", plan) == 0
    out, err = capsys.readouterr()
    assert out == f"{PLANTED_LAYER}\n"
    assert f"of {LAYERS - 1} random plans at equal bytes" in err
    found, judged = load(ProtectionPlan, plan), load(Evidence, evidence)
    assert not found.predicted
    assert found.reasons[-1] == judged.verdict
    assert judged.plan.predicted


def test_the_plan_stays_a_prediction_without_it(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recommend", swept, "--top", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["predicted"] is True


def test_evidence_of_nothing_is_refused(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recommend", swept, "--top", "1", "--evidence", tmp_path / "x.json") == 2
    assert "add --verify" in capsys.readouterr().err


def test_another_model_than_the_swept_one_is_refused(
    swept: Path, planted_file: str, tmp_path: Path, planted_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(planted_model, other)
    weights = other / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, weights, metadata={"format": "pt"})
    assert run("recommend", swept, "--top", "1", "--model", other, "--texts", planted_file, "--verify") == 2
    err = capsys.readouterr().err
    assert "is not the model that was swept" in err
