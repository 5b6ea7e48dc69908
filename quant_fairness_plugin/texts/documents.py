"""Load text to calibrate on: any source of documents in, checked `Documents` with a checksum out.

Unlike the sentences that languages are compared on, these need not be the same in every language, nor equally many.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import Documents, TextSet, digest
from quant_fairness_plugin.artifacts.documents import Document
from quant_fairness_plugin.artifacts.used import pieces_of
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnknownLanguageError
from quant_fairness_plugin.texts.columns import check_sentences, name_columns
from quant_fairness_plugin.texts.languages import normalise_language
from quant_fairness_plugin.texts.lines import name_unread, parse_document, read_corpus, read_lines, split_folder
from quant_fairness_plugin.texts.load import bundled_content, load_texts
from quant_fairness_plugin.texts.sentences import clean_sentence
from quant_fairness_plugin.texts.sources import BUNDLED, column_language, language_columns
from quant_fairness_plugin.texts.tables import read_table

ENOUGH_TOKENS = 2048
"""Of each language, of text that nobody chose: the time grows with the tokens, and what they bring less and less."""
BUNDLED_DOCUMENTS = Path(__file__).parent / "bundled" / "documents.jsonl"
LANGUAGE, TEXT, MESSAGES = "language", "text", "messages"
"""Keys of a row that says itself which language it is in."""
CALIBRATED_PARTS = ("calibrate", "all")
"""Of a table with a column `part`, the rows that may be calibrated on."""
_ROLES = ("system", "user", "assistant")
Found = tuple[str, str, object]
"""Where a document is, its language's tag as it is written, and what is there."""
_logger = logging.getLogger(__name__)


def load_documents(source: str | Path, *, languages: Sequence[str] | None = None) -> Documents:
    """Load documents in several languages and check them. Those that repeat an earlier one are left out.

    Args:
        source: a `.jsonl` file of rows `{"language", "text"}` or `{"language", "messages": [{"role", "content"}]}`; a
            `.csv` or `.tsv` table with the columns `language` and `text`, or with a column for each language, whose
            cells may be empty; a `.json` file `{lang: text or [texts]}`; a folder of `<lang>.txt` (a document a line),
            of `<lang>.jsonl` (rows without `language`) and of folders `<lang>` (a document a `.txt` file); `bundled`;
            or whatever else `load_texts` takes, of which the part `calibrate` is used.
        languages: tags of the languages to load; all of the source where None.

    Raises:
        UnknownLanguageError: a language that is none, or a source without any of `languages`.
        ArtifactError: a file that is missing, malformed, or holds a damaged text; says where.
    """
    path = Path(source).expanduser()
    if source == BUNDLED:
        documents = bundled_documents()
    elif not path.exists() or _is_parallel(path):
        documents = Documents.of(load_texts(source, reference=None))
    else:
        documents = _checked(path)
    wanted = None if languages is None else [normalise_language(tag) for tag in languages]
    chosen_rows = {name: rows for name, rows in documents.texts.items() if wanted is None or name in wanted}
    if not chosen_rows:
        raise UnknownLanguageError(
            f"{documents.name} has no text in {', '.join(wanted or ())} to calibrate on; it has "
            f"{', '.join(documents.languages) or 'none'}"
        )
    if left_out := [name for name in documents.languages if name not in chosen_rows]:
        level = logging.INFO if source == BUNDLED else logging.WARNING
        _logger.log(level, "%s: not calibrated on, as not measured: %s", documents.name, ", ".join(left_out))
    return Documents(name=documents.name, texts=chosen_rows, sha256=digest(chosen_rows))


def documents_of(texts: TextSet) -> Documents:
    """Return what a text set is calibrated on: its part `calibrate`, and with the whole bundled one its documents.

    Raises:
        ArtifactError: as `bundled_documents`.
    """
    if texts.name == BUNDLED and texts.part("calibrate").ids == load_texts(BUNDLED).part("calibrate").ids:
        return replace(load_documents(BUNDLED, languages=texts.languages), enough=ENOUGH_TOKENS)
    return Documents.of(texts)


def bundled_documents() -> Documents:
    """Return the part `calibrate` of the bundled sentences, and behind it the bundled documents of each language.

    Raises:
        ArtifactError: a file that is missing or altered.
    """
    sentences = Documents.of(load_texts(BUNDLED, reference=None))
    documents: dict[str, list[Document]] = {name: list(rows) for name, rows in sentences.texts.items()}
    lines = bundled_content(BUNDLED_DOCUMENTS).decode("utf-8").strip().split("\n")
    for number, line in enumerate(lines, start=1):
        row = json.loads(line)
        documents[row[LANGUAGE]].append(clean_sentence(row[TEXT], f"{BUNDLED_DOCUMENTS.name} line {number}"))
    texts = {name: tuple(rows) for name, rows in documents.items()}
    return Documents(name=f"bundled, with {BUNDLED_DOCUMENTS.name}", texts=texts, sha256=digest(texts))


def check_apart(documents: Documents, texts: TextSet) -> None:
    """Refuse to calibrate on sentences that plans are chosen or results reported on.

    Raises:
        ConfigError: says how many there are.
    """
    judged = {text for part in ("search", "confirm") for rows in texts.part(part).sentences.values() for text in rows}
    pieces = {piece for rows in documents.texts.values() for row in rows for piece in pieces_of(row)}
    if both := judged & pieces:
        raise ConfigError(
            f"{documents.name} holds {len(both)} of the sentences that {texts.name} measures on, such as "
            f"{reprlib.repr(min(both))}: no figure would be held out. Remove them, or give other --texts"
        )


def _is_parallel(path: Path) -> bool:
    """Return whether a file is one of rows with a text in every language, which `load_texts` reads."""
    if path.suffix.lower() != ".jsonl":
        return False
    first = next(iter(read_lines(path)), "")
    row = parse_document(first, f"{path} line 1") if first.strip() else None
    return isinstance(row, dict) and LANGUAGE not in row


def _checked(path: Path) -> Documents:
    if path.is_file() and path.suffix.lower() not in _READERS:
        raise ConfigError(
            f"{path}: not a kind of text file that can be read; accepted are {', '.join(_READERS)} files and folders"
        )
    reader = read_folder if path.is_dir() else _READERS[path.suffix.lower()]
    texts: dict[str, dict[Document, None]] = {}
    total = 0
    for where, tag, content in reader(path):
        document = _document(content, where)
        texts.setdefault(column_language(tag, where), {})[document] = None
        total += 1
    if not texts:
        raise ArtifactError(f"{path}: no text to calibrate on; expected documents in at least one language")
    if repeated := total - sum(map(len, texts.values())):
        _logger.warning("%s: left out %d of %d documents that repeat an earlier one", path.name, repeated, total)
    return Documents(name=path.resolve().name, texts={name: tuple(rows) for name, rows in texts.items()}, sha256="")


def read_folder(folder: Path) -> Iterator[Found]:
    """Yield the documents of `<lang>.txt`, `<lang>.jsonl` and of the `.txt` files in folders `<lang>`.

    Endings count in upper and lower case; what is not read is named in the log.
    """
    taken, others = split_folder(folder, lambda path: path.is_dir() or path.suffix.lower() in (".txt", ".jsonl"))
    for path in taken:
        if path.is_dir():
            files, unread = split_folder(path, lambda file: file.is_file() and file.suffix.lower() == ".txt")
            others += unread if files else [path]
            yield from _column(path.name, [(str(file), "\n".join(read_lines(file))) for file in files], str(path))
        elif path.suffix.lower() == ".txt":
            yield from _column(path.stem, list(_filled(read_lines(path), path)), str(path))
        else:
            yield from ((where, path.stem, row.get(TEXT, row.get(MESSAGES))) for where, row in _rows(path))
    name_unread(folder, others)


def read_jsonl(path: Path) -> Iterator[Found]:
    """Yield the documents of rows with a language, and a text or messages."""
    for where, row in _rows(path):
        yield where, _tag(row, where), row.get(TEXT, row.get(MESSAGES))


def read_columns(path: Path) -> Iterator[Found]:
    """Yield the documents of a table with the columns `language` and `text`, or with a column for each language.

    Columns are judged as those of `--texts` are: what holds numbers or names of rows is no language. Rows that a column
    `part` keeps for searching and confirming are left out.
    """
    table, source = read_table(path), str(path)
    rows = [(where, row) for where, row in table.rows if row.get("part", "all") in CALIBRATED_PARTS]
    if kept := len(table.rows) - len(rows):
        _logger.warning("%s: left out %d of %d rows, whose part is not calibrate", source, kept, len(table.rows))
    if {LANGUAGE, TEXT} <= set(table.columns):
        name_columns([name for name in table.columns if name not in (LANGUAGE, TEXT)], None, source)
        yield from ((where, row[LANGUAGE], row[TEXT]) for where, row in rows)
        return
    identifier, names = language_columns(table.columns, [row for _, row in table.rows], source)
    name_columns([name for name in table.columns if name not in names], identifier, source)
    _check_once(names, source)
    for name in names:
        cells = [(f"{where}, {name}", row[name]) for where, row in rows if row[name].strip()]
        yield from _column(name, cells, source)


def read_json(path: Path) -> Iterator[Found]:
    """Yield the documents of one object `{lang: text or [texts]}`."""
    document = parse_document(read_corpus(path), str(path))
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: {type(document).__name__} instead of an object {{language: text or [texts]}}")
    _check_once(document, str(path))
    for tag, texts in document.items():
        several = texts if isinstance(texts, list) else [texts]
        places = [(f"{path}, {tag} {number}", text) for number, text in enumerate(several, start=1)]
        yield from _column(tag, places, str(path))


def _column(tag: str, found: Sequence[tuple[str, object]], source: str) -> Iterator[Found]:
    """Yield documents that are in a language by the name of their column, key or file, if they can be."""
    check_sentences(tag, [content for _, content in found], source)
    return ((where, tag, content) for where, content in found)


def _check_once(tags: Iterable[str], source: str) -> None:
    """Refuse two columns of one language, such as `he` and `iw`."""
    seen: set[str] = set()
    for tag in tags:
        language = column_language(tag, source)
        if language in seen:
            raise ArtifactError(f"{source}: {language} occurs twice (once as {reprlib.repr(tag)}); keep one of them")
        seen.add(language)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _filled(read_lines(path), path):
        row = parse_document(line, where)
        if not isinstance(row, dict) or (TEXT in row) == (MESSAGES in row):
            raise ArtifactError(f"{where}: expected an object with {TEXT!r} or {MESSAGES!r}, one of the two")
        yield where, row


def _filled(lines: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
    return ((f"{path} line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())


def _tag(row: Mapping[str, Any], where: str) -> str:
    tag = row.get(LANGUAGE)
    if not isinstance(tag, str):
        raise ArtifactError(f"{where}: {LANGUAGE} {reprlib.repr(tag)} is no language tag; write for example 'he'")
    return tag


def _document(content: object, where: str) -> Document:
    if not isinstance(content, list):
        return clean_sentence(content, where)
    said = [_message(message, where) for message in content]
    if not said:
        raise ArtifactError(f"{where}: a conversation without messages; leave it out")
    return tuple(said)


def _message(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ArtifactError(
            f"{where}: a message is no object with a 'role' ({', '.join(_ROLES)}) and a 'content'; mend the file"
        )
    return str(message["role"]), clean_sentence(message.get("content"), f"{where}, {message['role']}")


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_columns,
    ".tsv": read_columns,
}
