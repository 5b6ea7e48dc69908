"""Calibration text as token rows, and how much each language counts.

Takes a tokenizer and a text set; returns a `CalibrationSet`. Budgets are counted after tokenization: an equal number of
*sentences* would give languages that the tokenizer splits finely several times the weight of the others.

- `uniform`: every language the same number of tokens and the same weight.
- `proportional`: every language all its tokens, and its share of them as weight.
- `english`: English alone.
- `minimax`: the tokens of `uniform`; the weights follow what rounding to nearest costs each language (`minimax`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from quant_fairness_plugin.artifacts import Documents, Start, TextSet, Weighting, digest, sentence_digests
from quant_fairness_plugin.artifacts.documents import Document
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.model.beginnings import Beginning, all_beginnings, beginning, chat_ids
from quant_fairness_plugin.model.tokenizer import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_TOKENS = 256
ENGLISH = "en"
PARTING = "\n"
"""What stands between two sentences of a row."""
Ids = tuple[int, ...]


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: Ids
    document: Document


class Row(NamedTuple):
    """A row of tokens, and what is in it."""

    ids: Ids
    start: Start | None
    """What it begins with; None where a chat template wrote it, which then says how it begins."""
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token rows per language. Rows hold no padding."""

    rows: dict[str, tuple[tuple[int, ...], ...]]
    source: str
    """Name of the text set."""
    text_sha256: str
    row_tokens: int
    """Length of every row but the last of a language, which may be shorter."""
    seed: int
    starts: Mapping[Start, Beginning] = field(default_factory=dict)
    """What stands before rows, in turn, of those that begin one; empty where rows were made otherwise."""
    weights: Mapping[str, float] | None = None
    """How much each language counts in what the quantizer minimises; they add up to 1. None = all the same."""
    weighting: Weighting = "uniform"
    """Where the weights come from."""
    nearest_kl: Mapping[str, float] = field(default_factory=dict)
    """`minimax`: KL in bits per byte of all weights rounded to nearest, which `weights` were made of; without the
    languages that the 16-bit model does not support."""
    sentences: str = ""
    """Digests of what is in the rows, see `UsedSentences`."""

    @property
    def shares(self) -> dict[str, float]:
        """Language → weight."""
        return dict(self.weights) if self.weights is not None else dict.fromkeys(self.rows, 1 / len(self.rows))

    @property
    def coverage(self) -> dict[str, int]:
        """Tokens per language, beginnings and line ends included."""
        return {language: sum(map(len, rows)) for language, rows in self.rows.items()}

    @property
    def telling_tokens(self) -> float:
        """How many tokens of equal weight would say as much of a mean over all languages (Kish's effective size)."""
        shares, tokens = self.shares, self.coverage
        return 1 / sum(shares[language] ** 2 / count for language, count in tokens.items())

    @property
    def row_counts(self) -> dict[str, int]:
        """Rows per language."""
        return {language: len(rows) for language, rows in self.rows.items()}

    @property
    def sha256(self) -> str:
        """Checksum of the token ids, language by language."""
        return digest({language: [list(row) for row in rows] for language, rows in self.rows.items()})

    def summary(self) -> dict[str, Any]:
        """What an export records of its calibration: plain data, without the tokens."""
        return {
            "source": self.source,
            "text_sha256": self.text_sha256,
            "tokens_sha256": self.sha256,
            "tokens_per_language": self.coverage,
            "rows_per_language": self.row_counts,
            "row_tokens": self.row_tokens,
            "weighting": self.weighting,
            "weights": self.shares,
            "starts": {name: list(ids) for name, ids in self.starts.items()},
            "seed": self.seed,
        } | ({"nearest_kl": dict(self.nearest_kl)} if self.nearest_kl else {})


def coverage_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was calibrated on, for people: a line on the text, then one for all languages that got alike.

    Args:
        summary: of a `CalibrationSet`, also as an `ExportRecord` holds it; empty where nothing was calibrated.
    """
    if not summary:
        return ["not calibrated"]
    tokens, rows, weights = (summary[key] for key in ("tokens_per_language", "rows_per_language", "weights"))
    source = f"calibration: {summary['source']}, sha256 {summary['text_sha256'][:12]}, weights {summary['weighting']}"
    nearest, starts = summary.get("nearest_kl", {}), summary.get("starts", {})
    alike: dict[str, list[str]] = {}
    for name, count in tokens.items():
        alike.setdefault(f"{rows[name]} rows, {count} tokens, weight {weights[name]:.3f}", []).append(name)
    return [
        source + (" by what rounding to nearest costs each language" if nearest else ""),
        *([f"  rows begin in turn: {', '.join(starts)}"] if starts else []),
        *(f"  {', '.join(names)}: {'each ' * (len(names) > 1)}{got}" for got, names in alike.items()),
    ]


def build_calibration(
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet | Documents,
    *,
    languages: Sequence[str] | None = None,
    tokens_per_language: int | None = None,
    row_tokens: int = ROW_TOKENS,
    seed: int = 0,
    weighting: Weighting = "uniform",
    starts: Sequence[Start] = (),
) -> CalibrationSet:
    """Pack documents into rows of tokens, every language to exactly the same number of tokens.

    Per language, the documents (equally many in one seeded order) are packed into rows of `row_tokens`, a line end
    between two of them; what a row cannot hold of one goes on in the next, and a conversation has rows of its own. The
    rows begin in every way in which text can begin under this tokenizer, in turn, and the languages take turns at which
    way is the first. The last row is cut where the language's tokens are used up.

    Args:
        tokenizer: the model's tokenizer.
        texts: documents, or a text set, of which only the part `calibrate` is used (`all` where it was not split).
        languages: which languages; all of the text set if None.
        tokens_per_language: tokens of every language, beginnings and line ends included; the smallest language's total
            if None, or as many as the documents say are enough. `proportional` takes all tokens of every language.
        row_tokens: length of a row; must fit into the model's context.
        seed: order of the sentences, and therefore which of them a longer language leaves out.
        weighting: how much each language counts; `minimax` starts from equal weights, which quantizing changes.
        starts: the ways to begin, see `model.beginnings`; all that leave half of a row for text if empty.

    Raises:
        UnknownLanguageError: a language that the text set lacks, among them English where it is wanted alone.
        ConfigError: no sentences to calibrate on, no languages, a language with too few tokens (says how many there
            are), sizes that are not positive, or a budget for `proportional`.
    """
    documents = Documents.of(texts) if isinstance(texts, TextSet) else texts
    if weighting == "english":
        languages = (_english(documents, languages),)
    used = _check(documents, languages, tokens_per_language, row_tokens)
    ways = _starts(tokenizer, starts, row_tokens)
    packed: dict[str, list[Row]] = {}
    for number, lang in enumerate(used):
        order = list(documents.texts[lang])
        random.Random(seed).shuffle(order)
        packed[lang] = _pack(tokenizer, order, islice(cycle(ways.items()), number, None), row_tokens)
    available = {lang: sum(len(row.ids) for row in rows) for lang, rows in packed.items()}
    budgets = _budgets(available, tokens_per_language, weighting, enough=documents.enough)
    total = sum(budgets.values())
    cut = {lang: _cut(rows, budgets[lang]) for lang, rows in packed.items()}
    taken = [row for rows in cut.values() for row in rows]
    return CalibrationSet(
        rows={lang: tuple(row.ids for row in rows) for lang, rows in cut.items()},
        source=documents.name,
        text_sha256=documents.sha256,
        row_tokens=row_tokens,
        seed=seed,
        starts={name: ids for name, ids in ways.items() if any(row.start == name for row in taken)},
        weights={lang: budget / total for lang, budget in budgets.items()} if weighting == "proportional" else None,
        weighting=weighting,
        sentences=sentence_digests(document for row in taken for document in row.documents),
    )


def _starts(tokenizer: PreTrainedTokenizerBase, names: Sequence[Start], row_tokens: int) -> dict[Start, Beginning]:
    """Return the beginnings to take in turn: those named, or all that leave half of a row for text."""
    if names:
        return {name: beginning(tokenizer, name) for name in names}
    return {name: ids for name, ids in all_beginnings(tokenizer).items() if len(ids) <= row_tokens // 2}


def _english(part: Documents, languages: Sequence[str] | None) -> str:
    """The tag of English (`en`, or a variety of it such as `en-GB`) among the languages."""
    offered = part.languages if languages is None else tuple(languages)
    for language in offered:
        if language.split("-")[0] == ENGLISH:
            return language
    raise UnknownLanguageError(
        f"calibration 'english' needs English, which is not among {', '.join(offered)} of {part.name}; "
        "add it to the text set, or calibrate with uniform, proportional or minimax weights"
    )


def _budgets(
    available: Mapping[str, int], wanted: int | None, weighting: Weighting, *, enough: int | None
) -> dict[str, int]:
    """Tokens that each language contributes, from those it has."""
    smallest = min(available, key=available.__getitem__)
    if weighting == "proportional" and wanted is not None:
        raise ConfigError(
            f"{wanted} tokens per language and 'proportional' weights exclude each other: these take all tokens of "
            "every language; leave the number out, or use uniform weights"
        )
    most = available[smallest] if enough is None else min(enough, available[smallest])
    budget = most if wanted is None else wanted
    if available[smallest] < max(budget, 1):
        raise ConfigError(
            f"{smallest} has {available[smallest]} calibration tokens, fewer than the {budget} of every language; "
            f"ask for at most {available[smallest]}, or give more text"
        )
    return dict(available) if weighting == "proportional" else dict.fromkeys(available, budget)


def _check(part: Documents, languages: Sequence[str] | None, tokens: int | None, row_tokens: int) -> tuple[str, ...]:
    names = part.languages if languages is None else tuple(languages)
    if unknown := [language for language in names if language not in part.languages]:
        raise UnknownLanguageError(
            f"{part.name} has no {', '.join(unknown)} to calibrate on; it has {', '.join(part.languages)}"
        )
    if not names or not len(part):
        raise ConfigError(
            f"{part.name} has no sentences to calibrate on in {len(names)} languages; "
            "give a text set with sentences in the part 'calibrate', and at least one language"
        )
    if row_tokens < 2:
        raise ConfigError(f"{row_tokens} tokens a row are too few; use at least 2, such as {ROW_TOKENS}")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"{tokens} tokens per language are too few; use at least 1, or None for as many as there are")
    return names


def _encoded(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Iterator[Encoded]:
    """Yield the ids of each document."""
    texts = iter(text_ids(tokenizer, [text for text in documents if isinstance(text, str)])["input_ids"])
    for document in documents:
        if isinstance(document, str):
            yield Encoded(tuple(next(texts)), document)
        else:
            yield Encoded(chat_ids(tokenizer, document), document)


def _pack(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    starts: Iterable[tuple[Start, Beginning]],
    length: int,
) -> list[Row]:
    """Return rows of `length` tokens that hold all documents: a conversation in its own, text behind a start, in turn.

    The last row of a conversation, and that of all text, may be shorter.
    """
    ways, parting = iter(starts), tuple(text_ids(tokenizer, [PARTING])["input_ids"][0])
    rows: list[Row] = []
    start, lead = next(ways)
    row, held = [*lead], list[Document]()
    for ids, document in _encoded(tokenizer, documents):
        if not isinstance(document, str):
            rows += [Row(ids[place : place + length], None, (document,)) for place in range(0, len(ids), length)]
            continue
        if len(row) > len(lead):
            row += parting[: length - len(row)]
        rest = ids
        while rest:
            if len(row) == length:
                rows.append(Row(tuple(row), start, tuple(held)))
                start, lead = next(ways)
                row, held = [*lead], []
            room = length - len(row)
            row += rest[:room]
            held.append(document)
            rest = rest[room:]
    return [*rows, Row(tuple(row), start, tuple(held))] if len(row) > len(lead) else rows


def _cut(rows: list[Row], budget: int) -> list[Row]:
    """Return the first `budget` tokens, in the same rows."""
    cut: list[Row] = []
    for row in rows:
        if budget <= 0:
            break
        cut.append(row._replace(ids=row.ids[:budget]))
        budget -= len(cut[-1].ids)
    return cut
