"""`quantize --format gguf`: what it writes, measures and says, and what it refuses before the work."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import typer

from quant_fairness_plugin.cli.main import app, run_guarded
from tests.export.gguf_files import write_gguf_of


@pytest.fixture
def like(planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file of the planted model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf_of(planted_model, tmp_path / "like.gguf")


def run(*arguments: str | Path) -> int:
    return run_guarded(typer.main.get_command(app), [*map(str, arguments)], "quant-fairness")


def test_a_plan_a_file_and_what_it_loses_are_printed(
    planted_model: Path,
    planted_file: str,
    like: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # a short name, which no line of the table breaks
    out = Path("small.gguf")
    command = (
        "quantize", planted_model, "--texts", planted_file, "--format", "gguf", "--like", like, "--bits", "5",
        "--max-overhead", "0.1", "--sentences", "4", "-o", out,
    )  # fmt: skip
    assert run(*command) == 0
    shown = capsys.readouterr()
    printed = " ".join(shown.out.split())
    assert "dequantizing" not in shown.err
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert {"Q5_0", "Q8_0"} <= types
    assert f"{out}: damage against the 16-bit model, confirm part" in printed
    assert "SHIP: no language loses more than 0.05" in printed
    assert "the rest INT5 g32" in printed
    assert "quantized modules equal to the checkpoint's to the last bit" in printed
    assert "llama.cpp was not run" in printed

    assert run(*command, "--overwrite", "--json") == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["file"]["types"]["Q5_0"] > 0
    assert parts["plan"]["overhead"] <= 0.1
    assert [row["language"] for row in parts["measurement"]["languages"]]
    assert parts["measurement"]["held_out"] is True

    assert run(*command, "--overwrite", "--gate", "worst=0.0000001") == 6
    assert out.is_file()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "from a GGUF file of the 16-bit model, and none is given; give one with --like"),
        (("--like", "none.gguf"), 2, "and 'none.gguf' is no file"),
        (("--like", "LIKE", "-o", "folder"), 2, "folder does not end in .gguf"),
        (("--like", "LIKE", "-o", "LIKE"), 2, "exists already"),
        (("--like", "LIKE", "--bits", "3"), 3, "GGUF files are not written with 3 bits"),
        (("--like", "LIKE", "--group-size", "128"), 3, "group size 128 saves nothing in a GGUF file"),
        (("--like", "LIKE", "--exhaustive"), 2, "exhaustive asks for a sweep, and plans for a GGUF file"),
        (("--like", "LIKE", "--protect-columns", "0.01"), 2, "a GGUF file has no place for them"),
        (("--like", "LIKE", "--format", "gptq"), 2, "like has an effect on format 'gguf' alone"),
        (("--embedding", "16bit", "--format", "awq"), 2, "embedding has an effect on format 'gguf' alone"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_read(
    planted_model: Path,
    like: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("opened before the refusal")

    monkeypatch.setattr("quant_fairness_plugin.fair_quantizer.FairQuantizer.from_source", never)
    monkeypatch.chdir(like.parent)
    given = [str(like) if option == "LIKE" else option for option in options]
    form = [] if "--format" in given else ["--format", "gguf"]
    assert run("quantize", planted_model, *form, *given) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_run_writes_folders_only(planted_model: Path, like: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--model", planted_model, "--format", "gguf", "--like", like) == 2
    assert "is one file, and a folder is to be written" in capsys.readouterr().err
