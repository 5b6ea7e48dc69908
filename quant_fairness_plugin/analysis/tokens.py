"""How many tokens the same sentences take in each language, and whether tokens follow morphemes. No weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import langcodes
import numpy as np

from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.analysis.segmentation import (
    GOLD,
    LanguageAlignment,
    Span,
    WordCounts,
    align,
    count_word,
    read_gold,
)
from quant_fairness_plugin.artifacts import Bootstrap, Interval, Number, Undefined
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.measure.intervals import Resamples, interval, ratio_interval, weighted_sums
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.model.tokenizer import Tokenizing, counting_tokenizer, text_ids

WITHOUT_SPACES = frozenset({"Hans", "Hant", "Hani", "Jpan", "Hira", "Kana", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"})
"""Scripts that do not separate words."""
SYLLABLES = frozenset({"vi"})
"""Languages whose spaces separate syllables."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class SentenceCounts:
    """Counts of every sentence of a language, in their order."""

    tokens: tuple[int, ...]
    bytes_: tuple[int, ...]
    characters: tuple[int, ...]
    words: tuple[int, ...]
    """Pieces between spaces."""
    parts: tuple[int, ...]
    """Tokens that are a part of a character: bytes that no longer token holds."""


@dataclass(frozen=True, slots=True)
class LanguageTokens:
    """One language's fertility, over all its sentences; special tokens are not counted."""

    language: str
    sentences: int
    per_byte: Interval
    per_character: Interval
    per_sentence: Interval
    to_reference: Number
    """Tokens over those of the reference language for the same sentences."""
    per_word: Number
    """Undefined where spaces do not separate words."""
    byte_share: Interval
    """Tokens that are a part of a character, of all tokens."""
    by_sentence: SentenceCounts


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """The answer of `analyze tokens`."""

    languages: tuple[LanguageTokens, ...]
    alignment: tuple[LanguageAlignment, ...]
    """Of the languages that the gold words are in."""


def analyse(request: Request) -> TokenStatistics:
    """Tokenize every sentence and every gold word.

    Raises:
        UnsupportedModelError: a tokenizer that does not say which characters a token stands for.
        ArtifactError: the gold words cannot be read.
    """
    texts, bootstrap = request.texts, request.config.bootstrap
    gold = read_gold(request.options.gold or GOLD)
    tokenizer = counting_tokenizer(request.files, trust_remote_code=request.files.runs_code)
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{request.files.name}: its tokenizer has no character offsets; expected one with a tokenizer.json. "
            "Convert it"
        )
    counts = {language: count_sentences(tokenizer, rows) for language, rows in texts.sentences.items()}
    reference = None if bootstrap.reference is None else counts[bootstrap.reference]
    words = {name: _count_words(tokenizer, name, gold[name]) for name in texts.languages if name in gold}
    return TokenStatistics(
        tuple(_row(name, own_counts, reference, bootstrap) for name, own_counts in counts.items()),
        tuple(align(name, pieces, bootstrap) for name, pieces in words.items()),
    )


def count_sentences(tokenizer: Tokenizing, sentences: Sequence[str]) -> SentenceCounts:
    """Return the counts of every sentence."""
    encoded = text_ids(tokenizer, sentences, offsets=True)
    return SentenceCounts(
        tokens=tuple(len(ids) for ids in encoded["input_ids"]),
        bytes_=tuple(len(text.encode()) for text in sentences),
        characters=tuple(len(text) for text in sentences),
        words=tuple(len(text.split()) for text in sentences),
        parts=tuple(
            _parts(tokenizer, *pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ),
    )


def separates_words(language: str) -> bool:
    """Return whether the pieces between spaces are words in the language's usual script."""
    likely = langcodes.Language.get(language).maximize()
    return likely.script not in WITHOUT_SPACES and likely.language not in SYLLABLES


def _parts(tokenizer: Tokenizing, ids: Sequence[int], spans: Sequence[Span]) -> int:
    """Count the tokens that share a character with the one before or after, or that are named as a byte."""
    joined = [start < before for (_, before), (start, _) in zip(spans, spans[1:], strict=False)]
    shared = zip([False, *joined], [*joined, False], strict=True) if spans else ()
    named = (_BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(index))) is not None for index in ids)
    return sum(left or right or byte for (left, right), byte in zip(shared, named, strict=True))


def _row(
    language: str, counts: SentenceCounts, reference: SentenceCounts | None, bootstrap: Bootstrap
) -> LanguageTokens:
    sentences = len(counts.tokens)
    names = SentenceCounts.__slots__
    columns: list[Any] = [getattr(counts, name) for name in names]
    columns.append(counts.tokens if reference is None else reference.tokens)
    sums = weighted_sums(Resamples.of(bootstrap, sentences).weights, np.array(columns, dtype=np.float64).T)
    tokens, bytes_, characters, words, parts, others = sums.T

    def over(numerator: Array, denominator: Array) -> Interval:
        return interval(np.asarray(numerator / denominator))

    spaceless = Undefined(f"spaces do not separate the words of {language}")
    return LanguageTokens(
        language=language,
        sentences=sentences,
        per_byte=over(tokens, bytes_),
        per_character=over(tokens, characters),
        per_sentence=interval(tokens / sentences),
        to_reference=Undefined("no reference language was given")
        if reference is None
        else ratio_interval(tokens, others, what=f"the number of tokens of {bootstrap.reference}"),
        per_word=over(tokens, words) if separates_words(language) else spaceless,
        byte_share=over(parts, tokens),
        by_sentence=counts,
    )


def _count_words(tokenizer: Tokenizing, language: str, words: Sequence[tuple[str, ...]]) -> dict[str, WordCounts]:
    """Tokenize words as they stand inside a sentence: after a space, where the script has spaces."""
    space = " " if separates_words(language) else ""
    encoded = text_ids(tokenizer, [space + "".join(word) for word in words], offsets=True)["offset_mapping"]
    return {
        "|".join(word): count_word(word, inside(spans, len(space))) for word, spans in zip(words, encoded, strict=True)
    }


def inside(spans: Sequence[Span], skipped: int) -> list[Span]:
    """Return the tokens of a word that begins after so many characters; a token of these alone is left out."""
    return [(max(start - skipped, 0), end - skipped) for start, end in spans if end > skipped]
