"""Every bad input: one line on stderr, nothing on stdout, the documented exit status, and torch not even imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.artifacts import save
from quant_fairness_plugin.cli.main import app, harmless, run_guarded
from quant_fairness_plugin.errors import ConfigError
from tests.cli.fresh import Commands, command_processes
from tests.planted import planted_report


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with command_processes() as started:
        yield started


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", layers=3))


BAD = [
    (["--protect-layers", "0,3"], 2, "layer 3 does not exist"),
    (["--protect-layers=-1"], 2, "layer -1 does not exist"),
    (["--protect-layers", "1,1"], 2, "listed more than once"),
    (["--protect-layers", "0,1,2"], 2, "nothing would be quantized"),
    (["--protect-layers", ""], 2, "is not a list of layer indices"),
    (["--protect-layers", "first"], 2, "is not a list of layer indices"),
    (["--langs", "en,xq"], 2, "xq"),
    (["--langs", "he,ar"], 2, "reference"),
    (["--langs", "en,sw"], 2, "sw"),
    (["--bits", "3.5"], 2, "bits '3.5' is not an integer"),
    (["--group-size", "100"], 2, "group size 100"),
    (["--no-protect-biases"], 2, "biases"),
    (["--format", "onnx"], 2, "format 'onnx'"),
    (["--colour"], 2, "No such option"),
    (["-o", "."], 2, "exists"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_a_bad_argument_is_one_line(
    commands: Commands, model: str, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    done = commands.run("gptq-quantize", model, *arguments, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not done.imported_torch
    assert list(tmp_path.iterdir()) == []


def spoil(source: Path, folder: Path, how: str) -> Path:
    """A copy of a model folder with one thing wrong."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    match how:
        case "no weights":
            weights.unlink()
        case "quantized":
            config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("no weights", 5, "weights"),
        ("quantized", 3, "already quantized"),
        ("pickle", 5, "--allow-pickle"),
        ("truncated", 5, "model.safetensors"),
    ],
)
def test_a_bad_model_folder_is_one_line(
    commands: Commands, model: str, tmp_path: Path, how: str, status: int, message: str
) -> None:
    folder = spoil(Path(model), tmp_path / "model", how)
    done = commands.run("gptq-quantize", str(folder), "-o", str(tmp_path / "out"), cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert not done.imported_torch
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "--model demo"),
        (["sweep", "--model", "demo", "--combine", "4"], "--combine '4' is not allowed"),
        (["sweep", "--model", "demo", "--granularity", "head"], "--granularity 'head' is unknown"),
        (["sweep", "--model", "demo", "--executor", "cloud"], "--executor 'cloud' is unknown"),
        (["sweep", "--model", "demo", "--workers", "2"], "--workers 2 is for --executor processes or ray"),
        (["sweep", "--model", "demo", "--executor", "local", "--workers", "2"], "--workers 2 is for --executor"),
        (["recommend", "--top", "1", "--max-overhead", "0.2"], "exclude each other"),
        (["recommend", "none.json"], "none.json: cannot be read"),
        (["measure"], "--model demo"),
        (["verify", "none"], "none"),
        (["quantise"], "No such command"),
    ],
)
def test_bad_commands_are_one_line(commands: Commands, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = commands.run("quant-fairness", *arguments, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode in (2, 5), done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert not done.imported_torch


def test_a_set_of_all_layers_is_one_line(commands: Commands, model: str, tmp_path: Path) -> None:
    done = commands.run("quant-fairness", "sweep", "--model", model, "--combine", "3", "--top", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    [message] = done.stderr.splitlines()
    assert "combine 3 would single out all 3 units" in message
    assert not done.imported_torch


@pytest.mark.parametrize(
    ("groups", "budget", "printed", "said"),
    [
        ((), "0.6", "2,4\n", ["note: predicted from single units: least worst damage within 4128 bytes"]),
        ((), "0.1", "", ["warning: one layer costs more than the budget of 10.00%"]),
        (
            ("o", "down"),
            "0.4",
            "1.o,2.o\n",
            ["note: predicted from single units: least worst damage within 2156 bytes"],
        ),
        (("o", "down"), "0.1", "", ["warning: one unit costs more than the budget of 10.00%"]),
    ],
)
def test_another_budget_is_solved_without_torch(
    commands: Commands, tmp_path: Path, groups: tuple[str, ...], budget: str, printed: str, said: list[str]
) -> None:
    report = planted_report([0.1, 0.4, 2.5, 0.2, 1.6, 0.3, 0.9, 0.05], noise=0.001, groups=groups)
    save(report, tmp_path / "sweep.json")
    done = commands.run("quant-fairness", "recommend", "sweep.json", "--max-overhead", budget, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
    assert not done.imported_torch


@pytest.mark.parametrize("arguments", [["--help"], *[[c, "--help"] for c in ("run", "sweep", "recommend", "verify")]])
def test_help_does_not_import_torch(commands: Commands, tmp_path: Path, arguments: list[str]) -> None:
    done = commands.run("quant-fairness", *arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stderr == ""
    assert not done.imported_torch


def test_an_import_of_torch_would_be_seen(commands: Commands, tmp_path: Path) -> None:
    done = commands.run("quant-fairness", "verify", ".", cwd=tmp_path)
    assert done.returncode == 5
    assert done.imported_torch


def test_names_from_files_do_not_reach_the_terminal_as_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(**_: object) -> int:
        raise ConfigError(f"\x1b[2J\u202eיש\x00{'x' * 10_000}")

    assert run_guarded(failing, [], "quant-fairness") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: \\x1b[2J\\u202eיש\\x00xxx")
    assert len(said) < 2100
    assert harmless("plain ✓ text\n") == "plain ✓ text\n"


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "demo", "-o", "{file}/out"),
        ("recommend", "--model", "demo", "-o", "{file}/plan.json"),
        ("measure", "--model", "demo", "-o", "{folder}"),
        ("sweep", "--model", "demo", "-o", "/proc/nope/sweep.json"),
        ("recommend", "--model", "demo", "--verify", "--evidence", "{folder}"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_read(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    monkeypatch.setattr("quant_fairness_plugin.model.load.load_model", lambda *_, **__: pytest.fail("read a model"))
    given = [word.format(file=file, folder=tmp_path) for word in words]
    assert run_guarded(typer.main.get_command(app), given, "quant-fairness") in (2, 4)
    assert capsys.readouterr().err.startswith("error: ")
