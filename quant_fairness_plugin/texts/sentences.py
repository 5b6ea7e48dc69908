"""One sentence as a file holds it, checked and brought to Unicode NFC; and the removal of repeated ones.

Damaged text is refused with its place instead of being mended: a replaced byte would be measured like any other.
"""

from __future__ import annotations

import logging
import unicodedata
from dataclasses import dataclass, replace

from quant_fairness_plugin.artifacts import Part
from quant_fairness_plugin.errors import ArtifactError

_logger = logging.getLogger(__name__)

# A novel is about a million characters: whatever is longer in one piece is a file that lost its line ends.
MAX_CHARACTERS = 1_000_000
MAX_MARKS = 30
"""Combining marks in a row: Unicode's stream-safe text format (UAX #15) has no more, and no language has. Bringing
thousands of them in order takes time that grows with their square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTexts:
    """What a source holds: checked sentences of equal number in every language, not yet split, with all languages."""

    sentences: dict[str, tuple[str, ...]]
    ids: tuple[str, ...]
    parts: tuple[Part, ...] | None
    """None where the source does not say."""
    registers: tuple[str, ...]
    """Empty strings where the source does not say."""


def clean_sentence(text: object, where: str) -> str:
    r"""Return the text in Unicode NFC, without outer white space and with `\n` line ends; otherwise as it was.

    Args:
        text: what the source holds.
        where: file, line and language for the message.

    Raises:
        ArtifactError: not text, empty, longer than `MAX_CHARACTERS`, or with a character that no clean text holds:
            a NUL or other control character (tabs and line ends are allowed), a lone surrogate, a noncharacter, or
            U+FFFD, which earlier damage left behind; or with more than `MAX_MARKS` combining marks in a row.
    """
    if not isinstance(text, str):
        raise ArtifactError(f"{where}: {type(text).__name__} instead of text; every language needs a sentence here")
    if len(text) > MAX_CHARACTERS:
        raise ArtifactError(
            f"{where}: {len(text):,} characters in one piece; accepted are {MAX_CHARACTERS:,}. Split it."
        )
    unix = text.replace("\r\n", "\n")
    marks = 0
    for character in unix:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MAX_MARKS:
            raise ArtifactError(f"{where}: more than {MAX_MARKS} combining marks in a row; remove the surplus ones")
        if fault := _fault(character):
            raise ArtifactError(f"{where}: {fault} U+{ord(character):04X} in the text; remove it or mend the file")
    clean = unicodedata.normalize("NFC", unix).strip()
    if not any(unicodedata.category(character)[0] not in "ZC" for character in clean):
        raise ArtifactError(f"{where}: the text is empty; every language needs a sentence here. Fill or drop the line.")
    return clean


def drop_repeated(raw: RawTexts, source: str) -> RawTexts:
    """Leave out each row that repeats an earlier sentence in any language, and log how many.

    A sentence that occurs twice could land in the search part and in the confirm part. All languages of the source
    count, whichever are used later, so that the same rows remain for every choice.
    """
    repeated: set[int] = set()
    for rows in raw.sentences.values():
        first = {text: index for index, text in reversed(list(enumerate(rows)))}
        repeated |= {index for index, text in enumerate(rows) if first[text] != index}
    if not repeated:
        return raw
    _logger.warning("%s: left out %d of %d rows that repeat an earlier one", source, len(repeated), len(raw.ids))
    keep = [index for index in range(len(raw.ids)) if index not in repeated]
    return replace(
        raw,
        sentences={language: tuple(rows[i] for i in keep) for language, rows in raw.sentences.items()},
        ids=tuple(raw.ids[i] for i in keep),
        parts=None if raw.parts is None else tuple(raw.parts[i] for i in keep),
        registers=tuple(raw.registers[i] for i in keep),
    )


def _fault(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "lone surrogate"
    if category == "Cc" and character not in "\t\n":
        return "control character"
    if character == "\ufffd":
        return "replacement character"
    # The last two code points of each plane, and U+FDD0-U+FDEF.
    if ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF:
        return "noncharacter"
    return ""
