"""What is asked: a few prompts in each language, the bundled ones or a file as text sets are. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.texts.sentences import RawTexts
from quant_fairness_plugin.texts.sources import BUNDLED, parse_jsonl, read_path

NO_PROMPTS = "none"
NEW_TOKENS = 32
"""Of an answer, at most: enough for a loop to show."""
_FILE = Path(__file__).parent / "bundled" / "prompts.jsonl"
_CHAT, _PLAIN = "question", "beginning"
"""Registers: what one asks a model that chats, and what another one goes on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts by language, in one order."""

    source: str
    """`bundled`, or the name of a file."""
    texts: Mapping[str, tuple[str, ...]]
    registers: tuple[str, ...]

    def of(self, language: str, *, chat: bool) -> tuple[str, ...]:
        """Return the prompts of a language for a model with a chat template, or without; none where it has none.

        Those of the register `question` are for the one, those of `beginning` for the other, all others for both.
        """
        other = _PLAIN if chat else _CHAT
        rows = zip(self.texts.get(language, ()), self.registers, strict=False)
        return tuple(text for text, register in rows if register != other)


def load_prompts(source: str) -> Prompts | None:
    """Read the prompts.

    Args:
        source: `bundled`; `none`; or a file or folder of the kinds that `load_texts` reads.

    Raises:
        ArtifactError: a file that is missing, malformed or empty.
        ConfigError: a file of another kind.
        UnknownLanguageError: a column that is named by no language.
    """
    if source == NO_PROMPTS:
        return None
    if source == BUNDLED:
        return _prompts(BUNDLED, parse_jsonl(_bundled(), BUNDLED))
    path = Path(source).expanduser()
    return _prompts(path.resolve().name, read_path(path))


def _prompts(source: str, raw: RawTexts) -> Prompts:
    return Prompts(source=source, texts=raw.sentences, registers=raw.registers)


def _bundled() -> bytes:
    try:
        return _FILE.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{_FILE}: the bundled prompts cannot be read ({err.strerror}); install again") from err
