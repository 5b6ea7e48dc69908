"""`quant-fairness generate`: the text and nothing else on stdout, its speed on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.serve.generate import generate_text, load_tokenizer
from quant_fairness_plugin.serve.load import load_quantized
from tests.export.build import TEXTS, quantize_tiny


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "out"
    quantized = quantize_tiny(tiny_model("llama"))
    export(quantized, out, texts=TEXTS, reader="transformers")
    return out


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), ["generate", *arguments], "quant-fairness")


def expected(folder: Path, tokens: int) -> str:
    model = load_quantized(folder, kernel="reference")
    return generate_text(model, load_tokenizer(folder), "one", max_new_tokens=tokens).text


def test_stdout_is_the_continuation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = expected(folder, 8)
    capsys.readouterr()
    assert run(str(folder), "--prompt", "one", "--max-new-tokens", "8", "--kernel", "reference") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{text}\n"
    assert "8 tokens, " in printed.err
    assert "tokens per second after the first" in printed.err
    assert "reference, float32 on cpu" in printed.err


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), "--prompt", "one", "--max-new-tokens", "3", "--kernel", "cpu", "--json") == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["prompt_tokens"], document["new_tokens"]) == (3, 3)
    assert (document["kernel"], document["where"]) == ("cpu", "bfloat16 on cpu")
    assert document["tokens_per_second"] > 0
    assert "tokens" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--kernel", "cuda"], 2, "unknown kernel 'cuda'; accepted are auto, triton, cpu, reference"),
        (["--kernel", "triton"], 2, "kernel 'triton' cannot run: they run on an NVIDIA GPU"),
        (["--max-new-tokens", "0"], 2, "0 new tokens cannot be generated"),
    ],
)
def test_an_error_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert run(str(folder), "--prompt", "one", *arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("error: ") == 1


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none"), "--prompt", "one") == 5
    assert "error: " in capsys.readouterr().err
