"""`gguf` says what it wrote, how it was checked, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.export.writer import export
from tests.export.build import TEXTS, quantize_tiny
from tests.export.gguf_files import write_gguf_of


@pytest.fixture
def files(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the GGUF file of its model."""
    model = tiny_model("llama")
    export(quantize_tiny(model, protected=()), tmp_path / "small", texts=TEXTS)
    return tmp_path / "small", write_gguf_of(model, tmp_path / "like.gguf")


def run(*arguments: str | Path) -> int:
    return run_guarded(typer.main.get_command(app), ["gguf", *map(str, arguments)], "quant-fairness")


def test_it_says_what_is_equal_and_what_is_rounded(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, like = files
    assert run(folder, "--like", like) == 0
    printed = capsys.readouterr().out
    out = folder.with_name("small.gguf")
    assert out.is_file()
    assert f"{out}: " in printed
    assert "14 Q4_0, 2 Q8_0" in printed
    assert "14 quantized modules equal to the checkpoint's to the last bit" in printed
    assert "Embedding and head in 8 bits: changed by 0." in printed
    assert "llama.cpp was not run" in printed

    assert run(folder, "--like", like, "--overwrite", "--embedding", "16bit", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["types"] == {"F16": 2, "F32": 5, "Q4_0": 14}
    assert report["bytes_"] == out.stat().st_size
    assert report["embedding_error"] is None


def test_what_it_cannot_use_is_one_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, like = files
    assert run(folder, "--like", folder / "config.json") == 5
    assert run(folder, "--like", like, "--embedding", "q4_0") == 2
    assert run(folder / "none", "--like", like) == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "is no GGUF file that can be read" in lines[0]
    assert "--embedding 'q4_0' is unknown; use q8_0 or 16bit" in lines[1]
