"""Files and folders of text as lines and decoded JSON, each fault with its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from quant_fairness_plugin.documents import MOST_BYTES, parse_json
from quant_fairness_plugin.errors import ArtifactError

NAMED = 5
"""Files that a message names; of the others it says how many there are."""
_logger = logging.getLogger(__name__)


def decode(content: bytes, source: str) -> str:
    """Decode UTF-8 bytes, with or without a byte order mark.

    Raises:
        ArtifactError: not UTF-8; names the line.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        raise ArtifactError(
            f"{source} line {line}: byte 0x{content[err.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from err


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror}); check the file and its permissions") from err


def read_corpus(path: Path) -> str:
    """Return the text of a UTF-8 file, however large: sentences are read line by line, and `parse_document` is bounded.

    Raises:
        ArtifactError: it cannot be read, or is not UTF-8; names the line.
    """
    return decode(read_bytes(path), str(path))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file; raises as `read_corpus`."""
    return split_lines(read_corpus(path))


def split_lines(text: str) -> list[str]:
    """Return the lines of a text without the empty ones at its end, which editors and spreadsheets leave behind."""
    # Not str.splitlines, which also splits at U+2028, form feeds and other characters inside a sentence.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def parse_document(text: str, where: str) -> object:
    """Return a decoded JSON document without repeated keys.

    Raises:
        ArtifactError: it is none, or larger than `MOST_BYTES`; says where.
    """
    if len(text) > MOST_BYTES:
        raise ArtifactError(f"{where}: JSON of more than {MOST_BYTES} characters; write a row a line in a .jsonl file")
    try:
        return parse_json(text)
    except ValueError as err:
        raise ArtifactError(f"{where}: not valid JSON ({err}); mend the file") from err


def split_folder(folder: Path, is_taken: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Return what is taken of a folder, and what is not, each sorted by name; hidden files are in neither."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in found if is_taken(path)], [path for path in found if not is_taken(path)]


def name_unread(folder: Path, others: Sequence[Path]) -> None:
    """Name in the log what of a folder is not read."""
    if others:
        names = [f"{path.name}/" if path.is_dir() else path.name for path in others]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        _logger.warning("%s: not read, as no text by their names: %s%s", folder, ", ".join(names[:NAMED]), more)
