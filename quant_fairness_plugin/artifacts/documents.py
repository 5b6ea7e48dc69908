"""Text to calibrate on, language by language: as much of each as there is, the same in no two languages."""

from __future__ import annotations

from dataclasses import dataclass

from quant_fairness_plugin.artifacts.texts import TextSet

Chat = tuple[tuple[str, str], ...]
"""A conversation: roles and what they say, in order."""
Document = str | Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Documents of each language, in no order that matters."""

    name: str
    texts: dict[str, tuple[Document, ...]]
    sha256: str
    enough: int | None = None
    """Tokens of each language that are calibrated on where nobody says how many; None is all that there are."""

    @classmethod
    def of(cls, texts: TextSet) -> Documents:
        """Return the part `calibrate` of a text set, each sentence a document."""
        part = texts.part("calibrate")
        return cls(name=texts.name, texts=dict(part.sentences), sha256=texts.sha256)

    @property
    def languages(self) -> tuple[str, ...]:
        """Language tags, in the order of the source."""
        return tuple(self.texts)

    @property
    def chats(self) -> tuple[str, ...]:
        """The languages that have conversations."""
        return tuple(name for name, rows in self.texts.items() if not all(isinstance(row, str) for row in rows))

    def __len__(self) -> int:
        return sum(map(len, self.texts.values()))
