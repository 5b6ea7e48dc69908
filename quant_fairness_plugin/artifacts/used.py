"""Which sentences a checkpoint was made with, as digests: enough to count them among others, and not to read them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quant_fairness_plugin.artifacts.documents import Document
from quant_fairness_plugin.artifacts.texts import TextSet

DIGEST_BYTES = 6
"""Of sha256. A million sentences beside a thousand others: one chance in 280,000 that two are taken for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedSentences:
    """Digests of the sentences that a checkpoint was calibrated on, and of those that its plan was searched on.

    Sorted, end to end, in base64; empty where there were none.
    """

    calibrated: str
    searched: str

    def __post_init__(self) -> None:
        """Refuse what is no list of digests."""
        for digests in (self.calibrated, self.searched):
            if len(base64.b64decode(digests, validate=True)) % DIGEST_BYTES:
                raise ValueError(f"{len(digests)} characters of digests, which have {DIGEST_BYTES} bytes each")

    def calibrated_in(self, texts: TextSet) -> int:
        """Return how many sentences of a set were calibrated on, in any of its languages."""
        return _count(self.calibrated, texts)

    def searched_in(self, texts: TextSet) -> int:
        """Return how many sentences of a set the plan was searched on, in any of its languages."""
        return _count(self.searched, texts)


def sentence_digests(documents: Iterable[Document]) -> str:
    """Return the digests of documents and of their lines, as `UsedSentences` holds them."""
    found = {_digest(piece) for document in documents for piece in pieces_of(document)}
    return base64.b64encode(b"".join(sorted(found))).decode()


def join_digests(*digests: str) -> str:
    """Return the digests of several texts as those of one."""
    return base64.b64encode(b"".join(sorted(set().union(*map(_split, digests))))).decode()


def pieces_of(document: Document) -> Iterator[str]:
    """Yield what a document holds that can be a sentence of a text set: each of its texts, and each line of these."""
    for text in (document,) if isinstance(document, str) else (said for _, said in document):
        yield text.strip()
        yield from (line.strip() for line in text.split("\n") if line.strip())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def _split(digests: str) -> set[bytes]:
    content = base64.b64decode(digests)
    return {content[start : start + DIGEST_BYTES] for start in range(0, len(content), DIGEST_BYTES)}


def _count(digests: str, texts: TextSet) -> int:
    used = _split(digests)
    columns = texts.sentences.values()
    return sum(any(_digest(column[i]) in used for column in columns) for i in range(len(texts)))
