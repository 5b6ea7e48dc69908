"""Sample logs of lm-eval (`--log_samples`) of two models, paired question by question. Imports no torch.

Multiple-choice tasks (MMLU, Belebele, Global-MMLU, MultiBLiMP): a question is right where its `acc` is 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from quant_fairness_plugin.analysis.questions import Question
from quant_fairness_plugin.documents import parse_json
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnknownLanguageError
from quant_fairness_plugin.texts.languages import normalise_language

UNNAMED = "unnamed"
"""The language of a task whose name holds none of the wanted ones, such as English MMLU."""
_NAME = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d{2}-\d{2}T.*\.jsonl")
Key = tuple[str, int, str]
"""Task, place of the question in it, checksum of the question."""


def parse_pair(text: str) -> tuple[Path, Path]:
    """Return the two logs of `BEFORE,AFTER`.

    Raises:
        ConfigError: not two paths.
    """
    paths = [part.strip() for part in text.split(",")]
    if len(paths) != 2 or not all(paths):
        raise ConfigError(f"--lm-eval-samples {text!r}: give the 16-bit model's log and the quantized one's, as A,B")
    return Path(paths[0]), Path(paths[1])


def read_pair(
    before: Path, after: Path, languages: Collection[str]
) -> tuple[dict[str, list[Question]], dict[str, tuple[tuple[bool, ...], tuple[bool, ...]]]]:
    """Read two logs of the same questions.

    Args:
        before: a `samples_….jsonl` of the 16-bit model, or a folder with some.
        after: those of the quantized model.
        languages: those that are looked for in the names of the tasks.

    Returns:
        Language → its questions, their texts left out; and language → right or wrong, before and after.

    Raises:
        ArtifactError: no logs, a task that is no multiple choice, or other questions in the two.
    """
    first, second = dict(_read(before)), dict(_read(after))
    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ArtifactError(
            f"{before} and {after} hold other questions: {len(differing)} are in one only, first {differing[0][:2]}; "
            "expected the same tasks, versions and limits. Run lm-eval with the same arguments"
        )
    questions: dict[str, list[Question]] = {}
    answers: dict[str, tuple[list[bool], list[bool]]] = {}
    for key in sorted(first):
        (options, right), (_, still) = first[key], second[key]
        language = language_of(key[0], languages)
        questions.setdefault(language, []).append(Question(language, key[0], options, 0))
        answers.setdefault(language, ([], []))[0].append(right)
        answers[language][1].append(still)
    return questions, {language: (tuple(one), tuple(two)) for language, (one, two) in answers.items()}


def language_of(task: str, languages: Collection[str]) -> str:
    """Return the wanted language that a part of a task's name stands for, such as `heb` in `belebele_heb_Hebr`."""
    for part in task.split("_"):
        try:
            tag = normalise_language(part)
        except UnknownLanguageError:
            continue
        if tag in languages:
            return tag
    return UNNAMED


def _read(path: Path) -> Iterator[tuple[Key, tuple[tuple[str, ...], bool]]]:
    files = sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ArtifactError(f"{path}: no samples_*.jsonl; expected a log of lm-eval with --log_samples")
    for file in files:
        name = _NAME.fullmatch(file.name)
        if name is None:
            raise ArtifactError(f"{file}: expected samples_TASK_DATE.jsonl, as lm-eval names its logs")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise ArtifactError(f"{file}: cannot be read ({err}); expected a log of lm-eval") from err
        for number, line in enumerate(lines, start=1):
            yield _sample(line, name["task"], f"{file} line {number}")


def _sample(line: str, task: str, where: str) -> tuple[Key, tuple[tuple[str, ...], bool]]:
    try:
        row: Any = parse_json(line)
        key = (task, int(row["doc_id"]), str(row["doc_hash"]))
        options, right = len(row["resps"]), float(row["acc"])
    except (ValueError, KeyError, TypeError) as err:
        raise ArtifactError(
            f"{where}: no sample of a task with acc ({err!r}); expected a multiple-choice task"
        ) from err
    if options < 2 or right not in (0.0, 1.0):
        raise ArtifactError(f"{where}: {options} response(s), acc {right}; expected a multiple-choice task")
    return key, (tuple(map(str, range(options))), right == 1.0)
