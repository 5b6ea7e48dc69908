"""Readers of text files: JSON, JSONL, TSV and folders, each into `RawTexts`."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from quant_fairness_plugin.artifacts import Part
from quant_fairness_plugin.documents import first_repeated
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnknownLanguageError
from quant_fairness_plugin.texts.columns import (
    META,
    check_sentences,
    identifier_column,
    is_identifier_name,
    name_columns,
    name_equal_columns,
)
from quant_fairness_plugin.texts.languages import normalise_language
from quant_fairness_plugin.texts.lines import (
    decode,
    name_unread,
    parse_document,
    read_bytes,
    read_corpus,
    read_lines,
    split_folder,
    split_lines,
)
from quant_fairness_plugin.texts.sentences import RawTexts, clean_sentence
from quant_fairness_plugin.texts.tables import read_table

BUNDLED = "bundled"
"""The source whose columns are known."""
Row = tuple[str, Mapping[str, Any]]
"""A place for messages (`texts.tsv line 3`) and the cells of a row."""


def read_path(path: Path) -> RawTexts:
    """Read a folder of `<lang>.txt`, or a `.json`, `.jsonl` or `.tsv` file.

    Raises:
        ArtifactError: there is no such file, or it cannot be read as text in parallel columns; says where.
        ConfigError: the name ends in something else.
        UnknownLanguageError: a file or column is not named by a language.
    """
    if path.is_dir():
        return read_folder(path)
    reader = _READERS.get(path.suffix.lower())
    if path.exists() and reader is None:
        raise ConfigError(f"{path}: not a kind of text file that can be read; accepted are {', '.join(_READERS)} files")
    if not path.is_file() or reader is None:
        raise ArtifactError(
            f"{path}: no such text set; accepted are 'bundled', a {', '.join(_READERS)} file, a folder of <lang>.txt "
            "files, or datasets:<name>[:split]. Check the name."
        )
    return reader(path)


def read_folder(folder: Path) -> RawTexts:
    """Read `<lang>.txt` files, one sentence a line, the same number in each; names other files in the log."""
    files, others = split_folder(folder, lambda path: path.is_file() and path.suffix.lower() == ".txt")
    name_unread(folder, others)
    if not files:
        raise ArtifactError(
            f"{folder}: no <lang>.txt file in this folder; expected en.txt, he.txt, ..., a sentence a line"
        )
    columns: dict[str, Sequence[object]] = {}
    for path in files:
        _add_column(columns, path.stem, read_lines(path), str(path))
    return _from_columns(columns, str(folder))


def read_json(path: Path) -> RawTexts:
    """Read one object `{lang: text or [texts]}`, the format of the seeds."""
    document = parse_document(read_corpus(path), str(path))
    if not isinstance(document, dict):
        raise ArtifactError(
            f"{path}: {type(document).__name__} instead of an object; expected {{language: text or [texts]}}"
        )
    columns: dict[str, Sequence[object]] = {}
    for tag, texts in document.items():
        _add_column(columns, tag, texts if isinstance(texts, list) else [texts], str(path))
    return _from_columns(columns, str(path))


def read_jsonl(path: Path) -> RawTexts:
    """Read one object a line: `{"id": ..., "part"?: ..., "register"?: ..., "<lang>": text, ...}`."""
    return parse_jsonl(read_bytes(path), str(path))


def parse_jsonl(content: bytes, source: str) -> RawTexts:
    """Read the bytes of a JSONL file; `source` names it in messages."""
    rows: list[Row] = []
    for number, line in enumerate(split_lines(decode(content, source)), start=1):
        where = f"{source} line {number}"
        row = parse_document(line, where)
        if not isinstance(row, dict):
            raise ArtifactError(f'{where}: not an object; expected {{"id": ..., "<lang>": text, ...}}')
        rows.append((where, row))
    return from_rows(rows, source)


def read_tsv(path: Path) -> RawTexts:
    """Read a table with tabs between cells and the language tags in its first line; see `read_table`."""
    return from_rows(read_table(path).rows, str(path))


def from_rows(rows: Sequence[Row], source: str) -> RawTexts:
    """Turn rows into columns; every row must have a text for each language of the first row, and no others.

    `part` and `register` are no languages, and a column `id` is one where it holds sentences (see `columns.py`).
    """
    if not rows:
        raise ArtifactError(f"{source}: no sentences; expected one row per sentence, with a text for each language")
    identifier, names = language_columns(rows[0][1], [row for _, row in rows], source)
    meta = {*META, identifier}
    if source != BUNDLED:
        name_columns([name for name in rows[0][1] if name in meta], identifier, source)
    for where, row in rows:
        if odd := {name for name in row if name not in meta} ^ set(names):
            raise ArtifactError(
                f"{where}: {_shown(odd)} is in this row or in the first one, but not in both; the languages of the "
                f"first row are {_shown(names)}. Parallel columns must have equal length: fill or drop the row."
            )
    columns: dict[str, Sequence[object]] = {}
    for name in names:
        _add_column(columns, name, [row[name] for _, row in rows], source)
    places = [where for where, _ in rows]
    raw = _from_columns(columns, source, places=places)
    return RawTexts(
        sentences=raw.sentences,
        ids=_ids([row.get(identifier) if identifier else None for _, row in rows], source) or raw.ids,
        parts=_parts(rows),
        registers=tuple(_register(row.get("register", ""), where) for where, row in rows),
    )


def language_columns(
    columns: Iterable[str], rows: Sequence[Mapping[str, object]], source: str
) -> tuple[str | None, list[str]]:
    """Return the column of row identifiers, None where there is none, and those that are languages, in their order.

    Raises:
        ArtifactError: a column that could be either; says how to name it.
        UnknownLanguageError: a column that is neither.
    """
    names = [name for name in columns if name not in META]
    beyond_doubt = [name for name in names if not is_identifier_name(name)]
    identifier = identifier_column(rows, beyond_doubt, source) if rows else None
    names = [name for name in names if name != identifier]
    for name in names:
        column_language(name, source)
    return identifier, names


def _from_columns(
    columns: Mapping[str, Sequence[object]], source: str, *, places: Sequence[str] | None = None
) -> RawTexts:
    lengths = {language: len(texts) for language, texts in columns.items()}
    if not lengths or 0 in lengths.values():
        empty = ", ".join(language for language, length in lengths.items() if not length) or "any language"
        raise ArtifactError(f"{source}: no sentences in {empty}; every language needs the same, at least one")
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{language} {length}" for language, length in lengths.items())
        raise ArtifactError(
            f"{source}: the languages have different numbers of sentences ({counted}); the set must be parallel, "
            "sentence i the same in every language. Fill or drop the extra ones."
        )
    count = next(iter(lengths.values()))
    where = places or [f"{source} sentence {i + 1}" for i in range(count)]
    sentences = {
        language: tuple(clean_sentence(text, f"{where[i]}, {language}") for i, text in enumerate(texts))
        for language, texts in columns.items()
    }
    name_equal_columns(sentences, source)
    return RawTexts(
        sentences=sentences,
        ids=tuple(f"s{i + 1:04d}" for i in range(count)),
        parts=None,
        registers=("",) * count,
    )


def _add_column(columns: dict[str, Sequence[object]], tag: str, texts: Sequence[object], where: str) -> None:
    language = column_language(tag, where)
    check_sentences(tag, texts, where)
    if language in columns:
        raise ArtifactError(f"{where}: {language} occurs twice (once as {reprlib.repr(tag)}); keep one of them")
    columns[language] = texts


def column_language(tag: str, where: str) -> str:
    """Return the language that a column or file is named by.

    Raises:
        UnknownLanguageError: it is none; says where.
    """
    try:
        return normalise_language(tag)
    except UnknownLanguageError as err:
        raise UnknownLanguageError(f"{where}: {err}") from err


def _ids(given: Sequence[object], source: str) -> tuple[str, ...]:
    if all(row_id is None for row_id in given):
        return ()
    if any(isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "" for row_id in given):
        raise ArtifactError(
            f"{source}: an id is missing, empty or no text; give every row a different id, or no row one"
        )
    ids = tuple(str(row_id) for row_id in given)
    if len(set(ids)) < len(ids):
        twice = reprlib.repr(first_repeated(ids))
        raise ArtifactError(f"{source}: id {twice} occurs more than once; give every row a different id")
    return ids


def _parts(rows: Sequence[Row]) -> tuple[Part, ...] | None:
    if not any("part" in row for _, row in rows):
        return None
    allowed = get_args(Part)
    for where, row in rows:
        if row.get("part") not in allowed:
            raise ArtifactError(
                f"{where}: part {reprlib.repr(row.get('part'))}; "
                f"accepted are {', '.join(allowed)}, in every row or in none"
            )
    return tuple(cast(Part, row["part"]) for _, row in rows)


def _register(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ArtifactError(f"{where}: register {reprlib.repr(value)} is no text; write a word, or leave it out")
    return value


def _shown(names: Iterable[str]) -> str:
    return ", ".join(reprlib.repr(name) for name in sorted(names))


_READERS: dict[str, Callable[[Path], RawTexts]] = {".json": read_json, ".jsonl": read_jsonl, ".tsv": read_tsv}
