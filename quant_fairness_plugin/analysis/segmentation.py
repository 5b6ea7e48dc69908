"""Do the boundaries of tokens fall on those of morphemes? Words split by hand, a tokenizer, and a random baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant_fairness_plugin.artifacts import Bootstrap, Number, Undefined
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.measure.intervals import Resamples, interval, weighted_sums
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.texts.languages import normalise_language

GOLD = Path(__file__).parent / "bundled" / "morphemes.tsv"
"""A small set of our own: 16 to 20 common words in each of eight languages, split as they are written."""
FEWEST_WORDS = 2
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WordCounts:
    """One word: boundaries inside it, and tokens."""

    tokens: int
    predicted: int
    """Token boundaries inside the word, those inside a character included."""
    gold: int
    """Morpheme boundaries inside the word."""
    hits: int
    expected_hits: float
    """Of as many boundaries between characters, placed at random."""
    morphemes: int
    """Tokens that are exactly one morpheme."""


@dataclass(frozen=True, slots=True)
class LanguageAlignment:
    """Token boundaries against morpheme boundaries in one language, all words together."""

    language: str
    words: int
    precision: Number
    recall: Number
    f1: Number
    random_f1: float | Undefined
    """F1 of the same numbers of boundaries placed at random: alignment is what lies above."""
    above_random: Number
    """F1 minus that of random boundaries, words paired."""
    morpheme_share: Number
    """Share of tokens that are morphemes."""
    by_word: dict[str, WordCounts]


def read_gold(path: Path) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return language → words, each as its morphemes in order; one line is `language<TAB>un|happi|ness`.

    Raises:
        ArtifactError: the file cannot be read, or a line is not of this form; names the line.
        UnknownLanguageError: a language that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path}: cannot be read ({err}); expected language<TAB>un|happi|ness a line") from err
    words_of: dict[str, list[tuple[str, ...]]] = {}
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        morphemes = tuple(cells[-1].split("|"))
        if len(cells) != 2 or not all(morphemes) or any(char.isspace() for char in cells[1]):
            raise ArtifactError(f"{path} line {number}: {line!r}; expected language<TAB>un|happi|ness. Correct it")
        words_of.setdefault(normalise_language(cells[0]), []).append(morphemes)
    return {language: tuple(words) for language, words in words_of.items()}


def count_word(morphemes: Sequence[str], tokens: Sequence[Span]) -> WordCounts:
    """Compare one word's tokens with its morphemes.

    Args:
        morphemes: in order; together the word.
        tokens: characters of the word that each token stands for, in order; two pieces of one character overlap.
    """
    ends = np.cumsum([len(morpheme) for morpheme in morphemes]).tolist()
    gold, spans = set(ends[:-1]), list(zip([0, *ends[:-1]], ends, strict=True))
    whole = [start >= before[1] for before, (start, _) in zip(tokens, tokens[1:], strict=False)]
    hits = sum(ok and start in gold for ok, (start, _) in zip(whole, tokens[1:], strict=True))
    places = ends[-1] - 1
    clear = [left and right for left, right in zip([True, *whole], [*whole, True], strict=True)]
    return WordCounts(
        tokens=len(tokens),
        predicted=len(whole),
        gold=len(gold),
        hits=hits,
        expected_hits=sum(whole) * len(gold) / places if places else 0.0,
        morphemes=sum(ok and span in spans for ok, span in zip(clear, tokens, strict=True)),
    )


def align(language: str, counts: dict[str, WordCounts], bootstrap: Bootstrap) -> LanguageAlignment:
    """Return the figures of a language from those of its words, with intervals over resampled words."""
    nothing = Undefined(f"{len(counts)} word(s): give at least {FEWEST_WORDS}")
    if len(counts) < FEWEST_WORDS:
        return LanguageAlignment(language, len(counts), *(nothing,) * 6, counts)
    rows = list(counts.values())
    columns = [[getattr(row, name) for row in rows] for name in WordCounts.__slots__]
    sums = weighted_sums(Resamples.of(bootstrap, len(rows)).weights, np.array(columns, dtype=np.float64).T)
    tokens, predicted, gold, hits, expected, morphemes = sums.T
    both = predicted + gold
    f1, random = _share(2 * hits, both), _share(2 * expected, both)
    return LanguageAlignment(
        language=language,
        words=len(rows),
        precision=_number(_share(hits, predicted), "tokens end inside no word"),
        recall=_number(_share(hits, gold), "no word has two morphemes"),
        f1=_number(f1, "there are no boundaries"),
        random_f1=Undefined("there are no boundaries") if np.isnan(random[0]) else significant(float(random[0])),
        above_random=_number(f1 - random, "there are no boundaries"),
        morpheme_share=_number(_share(morphemes, tokens), "there are no tokens"),
        by_word=counts,
    )


def _share(part: Array, whole: Array) -> Array:
    shares: Array = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return shares


def _number(series: Array, reason: str) -> Number:
    return Undefined(f"{reason}, in some resamples at least") if np.isnan(series).any() else interval(series)
