"""What the columns of a table hold: sentences, or names and numbers of rows. Some language tags are both.

`id` is Indonesian and the usual name of a row's identifier, `no` Norwegian and a number, `is` Icelandic and a yes or
no; `set`, `src` and `pos` are languages of three letters. The values tell which is meant; where they do not, a column
is refused, and none is ever left out without a word.
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

from quant_fairness_plugin.errors import ArtifactError

Kind = Literal["sentences", "identifiers", "unclear"]
_logger = logging.getLogger(__name__)

IDENTIFIER = "id"
"""A column of this name, in upper or lower case, is one of row identifiers or of Indonesian."""
ROW_ID = "row_id"
"""The name of a column of row identifiers that cannot be mistaken."""
INDONESIAN = "ind"
"""The name of a column of Indonesian that cannot be mistaken."""
META = (ROW_ID, "part", "register")
"""Columns that are never a language."""
_WORD = re.compile(r"[^\W\d_]{2,}")
_NUMBERED = re.compile(r"(?=.*\d)[!-~]+", re.ASCII)
_TRUTH = frozenset({"true", "false", "yes", "no", "none", "null", "nan", "n/a"})
_HALF = 0.5


def is_identifier_name(name: str) -> bool:
    """Return whether a column is called `id`, in whatever case."""
    return name.strip().lower() == IDENTIFIER


def identifier_column(rows: Sequence[Mapping[str, object]], languages: Sequence[str], source: str) -> str | None:
    """Return the name of the column of row identifiers, by the names and values of a table; None where it has none.

    Args:
        rows: the cells by column.
        languages: the columns that are languages beyond doubt; `ind` among them says that `id` is not Indonesian.
        source: what to call the table in a message.

    Raises:
        ArtifactError: a column `id` that could be either; says how to name it.
    """
    if ROW_ID in rows[0]:
        return ROW_ID
    name = next((name for name in rows[0] if is_identifier_name(name)), None)
    if name is None or any(other.strip().lower() in (INDONESIAN, "in") for other in languages):
        return name
    values = [row[name] for row in rows if row.get(name) not in (None, "")] or [""]
    kind = column_kind(values, [[row.get(other) for row in rows] for other in languages])
    if kind == "unclear":
        raise ArtifactError(
            f"{source}: column {name!r} could hold Indonesian or row identifiers ({_examples(values)}). Name it "
            f"{INDONESIAN!r} if it is Indonesian, {ROW_ID!r} if it names the rows"
        )
    if kind == "sentences":
        _logger.warning(
            "%s: column %r is taken for Indonesian, as it holds sentences; name it %r if it names the rows",
            source, name, ROW_ID,
        )  # fmt: skip
        return None
    return name


def column_kind(values: Sequence[object], others: Sequence[Sequence[object]]) -> Kind:
    """Return what a column holds, judged by its values beside those of columns of sentences.

    Args:
        values: of the column.
        others: values of the columns that hold sentences.
    """
    phrases = _share_of_phrases(values)
    around = max(map(_share_of_phrases, others), default=0.0)
    distinct = len({str(value) for value in values}) / len(values)
    if phrases and phrases >= min(_HALF, _HALF * around if around else _HALF):
        return "sentences" if distinct >= _HALF else "unclear"
    if not phrases and (around >= _HALF or not any(_is_word(value) for value in values)):
        return "identifiers"
    return "unclear"


def _share_of_phrases(values: Sequence[object]) -> float:
    """Return the share of values that are several words; `Genesis 1:1` is an identifier, not a phrase."""
    return sum(isinstance(value, str) and _is_phrase(value) for value in values) / max(1, len(values))


def _is_phrase(value: str) -> bool:
    numbered = any(character.isdigit() for character in value) and len(value.split()) <= 3
    return len(_WORD.findall(value)) > 1 and len(value.split()) > 1 and not numbered


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(_WORD.search(value)) and not _NUMBERED.fullmatch(value)


def check_sentences(name: str, values: Sequence[object], source: str) -> None:
    """Refuse a column that is a language by its name and that holds numbers, identifiers or one word over and over.

    Raises:
        ArtifactError: says what it holds.
    """
    texts = [value.strip() for value in values if isinstance(value, str)]
    if len(texts) < len(values) or not all(texts):
        return  # what is no text, or empty, is refused by its place
    numbers = all(_NUMBERED.fullmatch(text) or text.lower() in _TRUTH for text in texts)
    constant = len(texts) > 2 and len(set(texts)) == 1 and len(texts[0].split()) <= 1
    if texts and (numbers or constant):
        what = "numbers, identifiers or yes and no" if numbers else "one word in every row"
        raise ArtifactError(
            f"{source}: column {name!r} is a language by its name, and holds {what} ({_examples(values)}), no "
            "sentences. Remove the column, or fill it with sentences"
        )


def name_columns(names: Sequence[str], identifier: str | None, source: str) -> None:
    """Name in the log the columns that are not taken for languages."""
    kinds = [f"{name} (row identifiers)" if name == identifier else name for name in names]
    if kinds:
        _logger.warning("%s: columns not taken for languages: %s", source, ", ".join(kinds))


def name_equal_columns(sentences: Mapping[str, Sequence[str]], source: str) -> None:
    """Name in the log the languages whose sentences are all those of another one."""
    for first, second in combinations(sentences, 2):
        if sentences[first] == sentences[second]:
            _logger.warning(
                "%s: %s and %s hold the same sentences; one of them is probably not in its language",
                source, first, second,
            )  # fmt: skip


def name_quoted_columns(header: Sequence[str], rows: Sequence[Sequence[str]], source: str) -> None:
    """Name in the log the columns of a table whose every cell is in quotes, which are read as part of the text."""
    for index, name in enumerate(header):
        cells = [row[index] for row in rows if len(row) > index]
        if len(cells) > 1 and all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
            _logger.warning("%s: every cell of column %r is in quotes, which are read as text", source, name)


def _examples(values: Sequence[object]) -> str:
    return ", ".join(reprlib.repr(value) for value in values[:3])
