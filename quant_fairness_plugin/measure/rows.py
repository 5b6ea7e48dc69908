"""Text as padded batches of token rows, and sums over rows as scores per sentence.

Each token is scored once, given the beginning that the text set asks for (`model.beginnings`) and the text before it.
Where nothing stands in front, the first token and its bytes are left out. A sentence longer than the context is read in
windows that overlap by half, each behind the beginning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_fairness_plugin.artifacts import LanguageScores, StateScores, TextSet
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.model.beginnings import Beginning, beginning
from quant_fairness_plugin.model.context import check_context, longest_input
from quant_fairness_plugin.model.tokenizer import check_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

PAD = 0
"""Any id will do: padding stands on the right, is masked, and its predictions are never read."""
UNKNOWN_SHARE = 0.01
NLL, KL, FLIPS = range(3)

Array = NDArray[np.float64]


class _Text(NamedTuple):
    """A tokenized sentence; `skipped` leading tokens (0 or 1) have no prediction, nor do their bytes count."""

    ids: tuple[int, ...]
    skipped: int
    bytes_: int
    unknown: int


class Row(NamedTuple):
    """One window of a sentence as the model reads it; it scores the tokens `ids[first:]`."""

    language: str
    sentence: int
    ids: tuple[int, ...]
    first: int


class Batch(NamedTuple):
    """Right-padded rows. `positions` index the flattened [rows · width] logits; all others have one entry a target."""

    rows: Sequence[Row]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """A tokenized text set, cut into windows."""

    texts: TextSet
    rows: tuple[Row, ...]
    encoded: dict[str, list[_Text]]

    def batches(self, batch_tokens: int) -> list[Batch]:
        """Return rows of similar length together, longest first, so that memory runs out at once or never."""
        return [pad_rows(rows) for rows in _batches(self.rows, batch_tokens)]

    def empty_totals(self) -> dict[str, Array]:
        """Return language → zeros `[3, sentences]`, to add the rows' NLL, KL and flips to."""
        return {language: np.zeros((3, len(self.texts))) for language in self.encoded}

    def state_scores(self, state: str, totals: dict[str, Array]) -> StateScores:
        """Return the sums over a state's rows as scores."""
        return StateScores(state=state, languages=_finish(totals, self.encoded))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: TextSet, *, context: int) -> TokenRows:
    """Tokenize every sentence and cut it into windows of at most `context` tokens.

    Raises:
        UnsupportedModelError: nothing in front, and no character offsets.
        ConfigError: a sentence without a token to score, a start that the tokenizer does not have, or one that leaves
            no room for text.
    """
    lead = beginning(tokenizer, texts.start)
    if len(lead) > context // 2:
        raise ConfigError(
            f"start {texts.start!r} puts {len(lead)} tokens before every text, and the model takes {context} at once; "
            "accepted are at most half. Use another --start"
        )
    encoded = {language: _encode(tokenizer, language, texts, bare=not lead) for language in texts.languages}
    rows = tuple(
        Row(language, index, ids, first)
        for language, sentences in encoded.items()
        for index, text in enumerate(sentences)
        for ids, first in _windows(text.ids, lead, context)
    )
    return TokenRows(texts, rows, encoded)


def tokenize_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: TextSet, *, context: int
) -> TokenRows:
    """Tokenize every sentence as a model reads it: in windows of at most `context` tokens and of its longest input.

    Raises:
        UnsupportedModelError: as `tokenize`, or a model that takes too few tokens at once.
        ConfigError: as `tokenize`.
        ArtifactError: a token that the model has no embedding for.
    """
    tokenized = tokenize(tokenizer, texts, context=min(context, position_limit(model)))
    ids = {identifier for row in tokenized.rows for identifier in row.ids}
    check_ids(tokenizer, ids, rows=embedding_rows(model), name=texts.name)
    return tokenized


def position_limit(model: PreTrainedModel) -> int:
    """Return the longest input of a model; `sys.maxsize` where nothing bounds it.

    Raises:
        UnsupportedModelError: too few tokens to score a sentence in windows.
    """
    return check_context(type(model).__name__, longest_input(model.config.to_dict()))


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many tokens a model has an embedding for."""
    return len(model.get_input_embeddings().get_parameter("weight"))


def sum_rows(batch: Batch, per_token: Tensor, name: str, texts: TextSet) -> Array:
    """Return scores per token `[targets, 3]` summed over the targets of each row, `[rows, 3]`.

    Raises:
        ArtifactError: a score is NaN or infinite.
    """
    per_row = torch.zeros(len(batch.rows), 3, dtype=torch.float64).index_add_(0, batch.owners, per_token.cpu())
    _check_finite(per_row, batch, name, texts)
    sums: Array = per_row.numpy()
    return sums


def _encode(tokenizer: PreTrainedTokenizerBase, language: str, texts: TextSet, *, bare: bool) -> list[_Text]:
    skipped = 1 if bare else 0
    if bare and not tokenizer.is_fast:
        raise UnsupportedModelError(
            "nothing stands before a text and the tokenizer gives no character offsets, so that the bytes of the first "
            "token are unknown; use --start bos or eos, or the tokenizer's fast version"
        )
    sentences = texts.sentences[language]
    encoding = text_ids(tokenizer, sentences, offsets=bool(skipped))
    encoded = []
    for index, sentence in enumerate(sentences):
        ids = tuple(encoding["input_ids"][index])
        bytes_ = len(sentence.encode())
        if len(ids) <= skipped:
            raise ConfigError(
                f"{language} sentence {texts.ids[index]!r} has {len(ids)} token(s), none of which can be scored; "
                "leave it out or give a longer one"
            )
        if skipped:
            bytes_ -= _first_token_bytes(tokenizer, sentence, ids, encoding["offset_mapping"][index])
        unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
        encoded.append(_Text(ids, skipped, bytes_, unknown))
    _warn_of_unknown_tokens(language, encoded)
    return encoded


def _first_token_bytes(
    tokenizer: PreTrainedTokenizerBase, sentence: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> int:
    if offsets[1][0] >= offsets[0][1]:
        return len(sentence[: offsets[0][1]].encode())
    # The token ends inside a character. Byte fallback spells a byte as <0xE4>, byte-level BPE as one symbol.
    token = str(tokenizer.convert_ids_to_tokens(ids[0]))
    return 1 if token.startswith("<0x") else len(token)


def _warn_of_unknown_tokens(language: str, texts: Sequence[_Text]) -> None:
    share = sum(text.unknown for text in texts) / sum(len(text.ids) for text in texts)
    if share > UNKNOWN_SHARE:
        _logger.warning(
            "%s: %.1f %% of the tokens are unknown to the tokenizer; its scores mean little", language, 100 * share
        )


def _windows(ids: tuple[int, ...], lead: Beginning, size: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Windows of at most `size` tokens, and in each the first token that no earlier window scored.

    Every window starts with the beginning, because models that were trained with one predict badly without it.
    """
    room = size - len(lead)
    start, scored = 0, 0 if lead else 1
    while scored < len(ids):
        chunk = ids[start : start + room]
        yield lead + chunk, len(lead) + scored - start
        scored = start + len(chunk)
        start += room // 2


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar length together, longest first, so that memory runs out at once or never."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad_rows(rows: Sequence[Row]) -> Batch:
    """Return rows as one batch, padded on the right."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
        positions += range(number * width + row.first - 1, number * width + len(row.ids) - 1)
        targets += row.ids[row.first :]
        owners += [number] * (len(row.ids) - row.first)
    return Batch(rows, ids, mask, torch.tensor(positions), torch.tensor(targets), torch.tensor(owners))


def _check_finite(scores: Tensor, batch: Batch, name: str, texts: TextSet) -> None:
    broken = (~torch.isfinite(scores).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        row = batch.rows[broken[0]]
        raise ArtifactError(
            f"state {name!r} predicts NaN or infinity on {row.language} sentence {texts.ids[row.sentence]!r}; every "
            "logit must be a finite number. Look for NaN or overflow in its weights and scales."
        )


def _finish(totals: dict[str, Array], encoded: dict[str, list[_Text]]) -> dict[str, LanguageScores]:
    return {
        language: LanguageScores(
            nll_nats=tuple(significant(value) for value in sums[NLL].tolist()),
            tokens=tuple(len(text.ids) - text.skipped for text in encoded[language]),
            bytes_=tuple(text.bytes_ for text in encoded[language]),
            # Rounding can push the KL of two nearly equal states a little below its bound.
            kl_nats=tuple(significant(max(0.0, value)) for value in sums[KL].tolist()),
            flips=tuple(round(value) for value in sums[FLIPS].tolist()),
            unknown=sum(text.unknown for text in encoded[language]),
        )
        for language, sums in totals.items()
    }
