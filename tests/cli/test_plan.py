"""`plan` says what a sweep takes without loading a model; `sweep --bank` and `--also` refuse early what cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import SweepReport, load
from quant_fairness_plugin.cli.main import app, run_guarded
from tests.export.build import quantize_tiny
from tests.planted_model import LAYERS
from tests.sweep.test_checkpoint_bank import write


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), list(arguments), "quant-fairness")


def test_one_document_says_everything(
    planted_model: Path, planted_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--texts", planted_file, "--group-size", "32", "--mode", "both", "--also", "embeddings", "--json"]
    limits = ["--format", "gptq", "--reader", "vllm", "--memory-budget", "1MB"]
    assert run("plan", "--model", str(planted_model), *asked, *limits) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == 1 + 2 * LAYERS + 1 + 1 + LAYERS  # none, both modes; embeddings alone and with all else
    assert found["least"] == found["most"]
    assert [(one["format"], one["reader"], one["reason"]) for one in found["readers"]] == [("gptq", "vllm", "")]
    assert found["seconds"]["low"] <= found["seconds"]["high"]
    assert found["streamed"]["spilled"] > 0


def test_words_for_people(
    tiny_model: Callable[..., Path], planted_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model("gpt2", layers=3))]
    assert run("plan", *model, "--texts", planted_file, "--group-size", "32", "--protect-layers", "1") == 0
    out = capsys.readouterr().out
    assert "3 layers" in out
    assert "an estimate" in out
    assert "gptq               transformers no: gpt2 keeps its weights in Conv1D modules" in out
    assert "gptq               vllm         loads it" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "--format 'gguf' is unknown; use compressed-tensors, "),
        (["--reader", "ollama"], "--reader 'ollama' is unknown; use transformers"),
        (["--memory-budget", "much"], "size 'much' is none"),
        (["--also", "positions", "--group-size", "32"], "the model has no positions of its own"),
        (["--protect-layers", "9", "--group-size", "32"], "layer 9 does not exist"),
        (["--combine", "3", "--granularity", "layer", "--group-size", "32", "--bits", "4.5"], "bits"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], message: str, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model()
    capsys.readouterr()  # what writing the model says
    assert run("plan", "--model", str(folder), *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_plan_needs_no_transformers() -> None:
    """Importing it would take longer than the whole answer may."""
    code = (
        "import sys\nfrom quant_fairness_plugin.cli.main import app, run_guarded\nimport typer\n"
        "arguments = ['plan', '--model', 'demo', '--langs', 'en']\n"
        "assert run_guarded(typer.main.get_command(app), arguments, 'quant-fairness') == 0\n"
        "print('transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


def test_a_sweep_over_a_bank_says_where_its_weights_are_from(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, out = write(quantize_tiny(planted_model, protected=(1,)), tmp_path / "bank"), tmp_path / "sweep.json"
    asked = [
        "sweep",
        "--model",
        str(planted_model),
        "--texts",
        planted_file,
        "--group-size",
        "32",
        "--bank",
        str(bank),
    ]
    assert run(*asked, "-o", str(out)) == 0
    assert "quantized weights: checkpoint compressed-tensors sha256 " in capsys.readouterr().out
    report = load(SweepReport, out)
    assert report.provenance.arguments["bank"].endswith(", 16 bit: 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bank", "absent"], "--bank absent: no such folder"),
        (["--also", "biases"], "the model has no biases of its own"),
        (["--also", "embeddings", "--bank", "absent"], "--bank goes without"),
    ],
)
def test_a_sweep_refuses_before_anything_is_loaded(
    arguments: list[str], message: str, tiny_model: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unreadable = tmp_path / "model"
    shutil.copytree(tiny_model(layers=4), unreadable)
    (unreadable / "tokenizer.json").write_text("{}", encoding="utf-8")  # loading it would fail otherwise
    capsys.readouterr()
    status = run("sweep", "--model", str(unreadable), "--group-size", "32", *arguments)
    printed = capsys.readouterr()
    assert status in (2, 5)
    assert printed.out == ""
    assert message in printed.err
    assert "tokenizer" not in printed.err


def test_what_is_simulated_is_shown_apart(
    planted_model: Path, planted_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--texts", planted_file, "--group-size", "32", "--mode", "quantize-one", "--also", "embeddings,norms"]
    assert run("sweep", "--model", str(planted_model), *asked) == 0
    first, _, second = capsys.readouterr().out.partition("simulation only")
    assert "quantize embeddings" in second
    assert "quantize norms" in second
    assert "quantize embeddings" not in first
