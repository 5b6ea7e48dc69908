"""Logs of lm-eval as its tracker writes them, reduced to the fields that are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from quant_fairness_plugin.analysis.choices import Choices, analyse
from quant_fairness_plugin.analysis.lm_eval import UNNAMED, language_of, parse_pair, read_pair
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.model.load import LoadedModel
from tests.analysis.samples import request_of


def write(folder: Path, task: str, right: Sequence[int], *, options: int = 4, stamp: str = "x") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"doc_id": i, "doc_hash": f"{stamp}{i}", "resps": [[["-1.0", "False"]]] * options, "acc": float(acc)}
        for i, acc in enumerate(right)
    ]
    path = folder / f"samples_{task}_2026-08-31T20-41-07.123456.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_two_logs_are_paired(tmp_path: Path, load: Callable[..., LoadedModel]) -> None:
    for model, he in (("before", [1, 1, 1, 0]), ("after", [1, 0, 0, 1])):
        write(tmp_path / model / "name", "belebele_heb_Hebr", he)
        write(tmp_path / model / "name", "mmlu_anatomy", [1, 1, 0])
    logs = (tmp_path / "before", tmp_path / "after")
    result = analyse(request_of(load("llama"), options={"lm_eval_samples": logs}))
    assert isinstance(result, Choices)
    rows = {(row.language, row.group): row for row in result.rows}
    he = rows["he", "belebele_heb_Hebr"]
    assert (he.questions, he.lost, he.won, he.chance, he.drop.estimate) == (4, 2, 1, 0.25, 0.25)
    assert rows[UNNAMED, "mmlu_anatomy"].drop.estimate == 0
    assert result.answers["he"]["after"] == (True, False, False, True)


def test_languages_come_from_names_of_tasks() -> None:
    wanted = ("en", "he", "ar", "zh")
    found = [language_of(task, wanted) for task in ("belebele_zho_Hans", "global_mmlu_ar_other", "arc_easy", "xnli_he")]
    assert found == ["zh", "ar", UNNAMED, "he"]


def test_logs_of_other_questions_are_refused(tmp_path: Path) -> None:
    before, empty = write(tmp_path / "a", "xnli_he", [1, 0]), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match="hold other questions: 4 are in one only"):
        read_pair(before, write(tmp_path / "b", "xnli_he", [1, 0], stamp="y"), ("he",))
    with pytest.raises(ArtifactError, match="line 1: 1 response"):
        read_pair(before, write(tmp_path / "c", "gsm8k", [1], options=1), ("he",))
    with pytest.raises(ArtifactError, match="no samples_"):
        read_pair(before, empty, ("he",))


def test_two_paths_are_needed() -> None:
    assert parse_pair("a, b") == (Path("a"), Path("b"))
    with pytest.raises(ConfigError, match="as A,B"):
        parse_pair("a")
