"""`compare A B`: on the planted model the unprotected checkpoint loses its second language, and little else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from tests.planted_model import PLANTED_LAYER

COMMAND = typer.main.get_command(app)
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pair(planted_model: Path, planted_file: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of the planted model: with its layer in 16 bit, and without."""
    out = tmp_path_factory.mktemp("pair")
    made = FairQuantizer.from_pretrained(planted_model, group_size=32, texts=planted_file, draws=100)
    made.protecting((PLANTED_LAYER,)).save_pretrained(out / "protected", measure=None)
    made.protecting("none").save_pretrained(out / "bare", measure=None)
    return out / "protected", out / "bare"


@pytest.fixture(scope="module")
def int8(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model as another tool writes W8A8: 8-bit integers with a scale a row, activations rounded too."""
    folder = tmp_path_factory.mktemp("others") / "w8a8"
    shutil.copytree(planted_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-8)
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale.half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run(*arguments: object) -> int:
    return run_guarded(COMMAND, [str(argument) for argument in arguments], "quant-fairness")


def test_the_second_is_worse_in_the_planted_language_alone(
    pair: tuple[Path, Path], planted_model: Path, planted_file: str, capsys: Printed, tmp_path: Path
) -> None:
    saved = tmp_path / "pair.json"
    status = run("compare", *pair, "--model", planted_model, "--texts", planted_file, "--margin", 0.1, "-o", saved)
    printed = capsys.readouterr()
    assert status == 6
    assert printed.out.startswith("WORSE: 1 of 2 languages lose more than 0.1 bits per byte beyond A; most he, +")
    assert "margin 0.1 is not kept. WORSE" in printed.err
    prose = ("A =", "B =", "WORSE", "en, he: weak: ")
    assert all(len(line) <= 80 for line in printed.out.splitlines() if not line.startswith(prose))
    document = json.loads(saved.read_text(encoding="utf-8"))
    for row_a, row_b in zip(document["first"]["languages"], document["second"]["languages"], strict=True):
        difference = document["differences"][row_a["language"]]
        alone = row_b["kl_bits_per_byte"]["estimate"] - row_a["kl_bits_per_byte"]["estimate"]
        assert difference["estimate"] == pytest.approx(alone, abs=1e-5)
        assert difference["low"] <= difference["estimate"] <= difference["high"]
    assert document["differences"]["he"]["low"] > 0.1 > abs(document["differences"]["en"]["high"])
    assert document["first"]["original_compared"] is document["second"]["original_compared"] is True


def test_the_other_way_round_the_margin_is_kept(
    pair: tuple[Path, Path], planted_model: Path, planted_file: str, capsys: Printed
) -> None:
    common = ("--model", planted_model, "--texts", planted_file)
    assert run("compare", *reversed(pair), *common, "--margin", 0.1) == 0
    assert capsys.readouterr().out.startswith("NO WORSE: no language loses more than 0.1 bits per byte beyond A")


def test_a_checkpoint_is_exactly_as_good_as_itself(
    pair: tuple[Path, Path], planted_model: Path, planted_file: str, capsys: Printed
) -> None:
    common = ("--model", planted_model, "--texts", planted_file)
    assert run("compare", pair[1], pair[1], *common, "--margin", 0, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    nothing = {"estimate": 0.0, "low": 0.0, "high": 0.0}
    assert list(document["differences"].values()) == [nothing, nothing]
    assert document["worst"] == document["mean"] == nothing


def test_another_tools_checkpoint_is_judged_and_what_is_not_known_of_it_is_said(
    int8: Path, pair: tuple[Path, Path], planted_model: Path, planted_file: str, capsys: Printed
) -> None:
    common = ("--model", planted_model, "--texts", planted_file)
    assert run("compare", pair[1], int8, *common, "--margin", 0.001) == 0
    printed = capsys.readouterr().out
    assert "checksum not compared" in printed
    assert "what w8a8 was calibrated on is not recorded" in printed
    assert "servers also round the activations of this checkpoint" in printed
    assert run("measure", int8, *common, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["worst_kl"]["estimate"] < 0.01
    assert (measured["original_compared"], measured["held_out"]) == (False, None)


def test_what_is_measured_alone_is_not_verified(int8: Path, capsys: Printed) -> None:
    assert run("verify", int8) == 3
    printed = " ".join(capsys.readouterr().err.split())
    assert "and 27 others hold no packed integers; such folders are measured and compared, and not" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "1 checkpoint given, and a comparison takes two: compare A B --model ORIGINAL"),
        (["A", "B", "--margin", "-1"], "--margin -1: accepted is a number of bits per byte, 0 or more"),
        (["A", "B", "--bits", "3"], "two checkpoints are compared as they are, so bits do nothing"),
        (["A", "B", "--matrix"], "so matrix do nothing"),
        (["--margin", "0.1"], "--margin 0.1 is for two checkpoints; name them: compare A B"),
        (["A", "nowhere"], "nowhere is not there; accepted is a checkpoint folder, or a .gguf file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str], message: str, pair: tuple[Path, Path], planted_model: Path, planted_file: str, capsys: Printed
) -> None:
    named = [{"A": str(pair[0]), "B": str(pair[1])}.get(argument, argument) for argument in arguments]
    assert run("compare", *named, "--model", planted_model, "--texts", planted_file) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in " ".join(printed.err.split())


def test_without_a_record_the_original_has_to_be_named(int8: Path, capsys: Printed) -> None:
    assert run("measure", int8) == 2
    assert "has no quant_fairness.json, so nothing says what it was made from" in " ".join(
        capsys.readouterr().err.split()
    )
