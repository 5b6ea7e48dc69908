"""A text set: the same sentences in every language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant_fairness_plugin.artifacts.names import Part, Start


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """The same sentences in every language (if `parallel`), in one order.

    `sentences[language][i]` belongs to `ids[i]`, `parts[i]` and `registers[i]`.
    """

    name: str
    sentences: dict[str, tuple[str, ...]]
    ids: tuple[str, ...]
    parts: tuple[Part, ...]
    registers: tuple[str, ...]
    parallel: bool
    sha256: str
    start: Start = "auto"
    """How the model meets each sentence; not in the checksum, as it is no part of the text."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Language tags, in the order of the set."""
        return tuple(self.sentences)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shared(self) -> int:
        """How many sentences belong to several parts: all of a set that was not split, and those that repeat."""
        owners: dict[tuple[str, str], set[Part]] = {}
        for language, rows in self.sentences.items():
            for text, part in zip(rows, self.parts, strict=True):
                owners.setdefault((language, text), set()).add(part)
        repeated = {key for key, parts in owners.items() if len(parts) > 1}
        return sum(
            part == "all" or any((language, rows[i]) in repeated for language, rows in self.sentences.items())
            for i, part in enumerate(self.parts)
        )

    def part(self, part: Part) -> TextSet:
        """The sentences of one part; a set that was too small to be split has one part, `all`, which serves as each."""
        return self.take([i for i, p in enumerate(self.parts) if p in (part, "all") or part == "all"])

    def take(self, keep: Sequence[int]) -> TextSet:
        """Some of the sentences, by position; the checksum stays that of the set they came from."""
        return replace(
            self,
            sentences={lang: tuple(rows[i] for i in keep) for lang, rows in self.sentences.items()},
            ids=tuple(self.ids[i] for i in keep),
            parts=tuple(self.parts[i] for i in keep),
            registers=tuple(self.registers[i] for i in keep),
        )

    def choose(self, languages: Sequence[str]) -> TextSet:
        """The same sentences in some of the languages; the checksum stays that of the set they came from."""
        return replace(self, sentences={language: self.sentences[language] for language in languages})
