"""Prompts of one's own are read as text sets are, and what cannot be read is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant_fairness_plugin.answers.prompts import load_prompts
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ArtifactError, UnknownLanguageError
from quant_fairness_plugin.preflight import ModelSource, preflight


def test_a_file_without_registers_is_for_every_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("en\the\nWho are you?\tמי אתה?\nSay hello.\tאמור שלום.\n", encoding="utf-8")
    prompts = load_prompts(str(path))
    assert prompts is not None
    assert prompts.source == "mine.tsv"
    assert prompts.of("he", chat=True) == prompts.of("he", chat=False) == ("מי אתה?", "אמור שלום.")
    assert prompts.of("ru", chat=True) == ()


def test_questions_are_for_chat_and_beginnings_for_the_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [f'{{"register": "{register}", "en": "{register} x"}}' for register in ("question", "beginning", "other")]
    path.write_text("\n".join(rows), encoding="utf-8")
    prompts = load_prompts(str(path))
    assert prompts is not None
    assert prompts.of("en", chat=True) == ("question x", "other x")
    assert prompts.of("en", chat=False) == ("beginning x", "other x")


def test_none_asks_nothing() -> None:
    assert load_prompts("none") is None


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("gone.tsv", None, ArtifactError, "gone.tsv: no such"),
        ("odd.tsv", "klingonish\nnuqneH\n", UnknownLanguageError, "klingonish"),
        ("empty.jsonl", "", ArtifactError, "no sentences"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_before_the_work(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], match: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=match):
        preflight(ModelSource("demo"), FairConfig(prompts=str(tmp_path / name)))
