"""Questions with options, of which one is right; a minimal pair is one with two. Imports no torch.

Three kinds of files: JSONL, one question a line; the folders of CLAMS (`he_evalset/simple_agrmt.txt`), where a line
`True` and a sentence is followed by `False` and the same sentence with one word wrong; and a TSV file of MultiBLiMP
(`heb.tsv`). Without a file, sentences of a text set are set against themselves with two words exchanged.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.documents import parse_json
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.texts.languages import normalise_language

_FORM = '{"language": "he", "group": "adjacent", "options": ["…", "…"], "answer": 0}'
_SUFFIX = "_evalset"
EXCHANGED = "two words exchanged"
"""The group of questions that are made of a text set."""
_FEWEST_SPACES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """Whole texts, one of which is right."""

    language: str
    group: str
    """What questions are compared by, such as the distance of an agreement."""
    options: tuple[str, ...]
    answer: int
    """Place of the right one."""


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a JSONL file, a folder of CLAMS, or a TSV file of MultiBLiMP.

    Raises:
        ArtifactError: nothing there, or a line that is no question; names the line.
        UnknownLanguageError: a language that is none.
    """
    read = _read_clams if path.is_dir() else _read_multiblimp if path.suffix == ".tsv" else _read_jsonl
    questions = tuple(read(path))
    if not questions:
        raise ArtifactError(f"{path}: no question; expected lines {_FORM}, or a folder with he{_SUFFIX}/*.txt")
    return questions


def exchanged(texts: TextSet, seed: int) -> tuple[Question, ...]:
    """Return each sentence against itself with two neighbouring words exchanged; characters where no space separates.

    It needs no file and no gold answer, and asks little: whether a model still prefers what somebody wrote.
    """
    draw = random.Random(seed)
    found = []
    for language, sentences in texts.sentences.items():
        for sentence in sentences:
            gap = " " if sentence.count(" ") >= _FEWEST_SPACES else ""
            words = sentence.split(gap) if gap else list(sentence)
            places = [place for place, (a, b) in enumerate(pairwise(words)) if a != b]
            if places:
                place = draw.choice(places)
                words[place : place + 2] = words[place + 1], words[place]
                found.append(Question(language, EXCHANGED, (sentence, gap.join(words)), 0))
    return tuple(found)


def _read_jsonl(path: Path) -> Iterator[Question]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not _is_question(row):
            raise ArtifactError(f"{path} line {number}: no question; expected {_FORM}. Correct the line")
        yield Question(normalise_language(row["language"]), row["group"], tuple(row["options"]), row["answer"])


def _is_question(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {"language", "group", "options", "answer"}:
        return False
    options, answer = row["options"], row["answer"]
    texts = isinstance(options, list) and all(isinstance(option, str) and option for option in options)
    named = isinstance(row["language"], str) and isinstance(row["group"], str)
    return (
        named and texts and len(set(options)) == len(options) > 1 and type(answer) is int and 0 <= answer < len(options)
    )


def _read_clams(folder: Path) -> Iterator[Question]:
    for file in sorted(folder.glob(f"*{_SUFFIX}/*.txt")):
        language = normalise_language(file.parent.name.removesuffix(_SUFFIX))
        rows = [line.partition("\t") for line in _lines(file)]
        if len(rows) % 2:
            raise ArtifactError(f"{file}: {len(rows)} lines; expected pairs of True and False")
        for number in range(0, len(rows), 2):
            (right, _, good), (wrong, _, bad) = rows[number : number + 2]
            if (right, wrong) != ("True", "False") or not good or not bad:
                raise ArtifactError(f"{file} line {number + 1}: expected True<TAB>text, then False<TAB>text")
            yield Question(language, file.stem, (good, bad), 0)


def _read_multiblimp(file: Path) -> Iterator[Question]:
    """The columns `sen` and `wrong_sen`; the group is `phenomenon`, where there is such a column."""
    rows = list(csv.DictReader(_lines(file), delimiter="\t", quoting=csv.QUOTE_NONE))
    language = normalise_language(file.stem)
    for number, row in enumerate(rows, start=2):
        good, bad = row.get("sen"), row.get("wrong_sen")
        if not good or not bad:
            raise ArtifactError(f"{file} line {number}: no sen and wrong_sen; expected a TSV file of MultiBLiMP")
        yield Question(language, row.get("phenomenon") or "multiblimp", (good, bad), 0)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path}: cannot be read ({err}); expected JSONL or a folder of CLAMS") from err
