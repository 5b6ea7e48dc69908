"""Step 3 of 8: per-sentence scores of model states; the only module of this step that runs models.

Takes model states and a `TextSet`; returns `StateScores`: negative log-likelihood, KL to the first state over the full
vocabulary and top-1 flips of every sentence. Batches are the outer loop and states the inner one, so that the 16-bit
model's probabilities of a batch serve all states and at most two [tokens, vocabulary] tensors are alive.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import LanguageScores, StateScores, TextSet
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.metrics import significant

logger = logging.getLogger(__name__)

PAD = 0
"""Any id will do: padding stands on the right, is masked, and its predictions are never read."""
SMALLEST_CONTEXT = 4
CHUNK_ELEMENTS = 1 << 22
"""Probabilities are compared in pieces of so many elements (16 MiB in float32)."""
UNKNOWN_SHARE = 0.01
NLL, KL, FLIPS = range(3)

Array = NDArray[np.float64]


class ModelState(NamedTuple):
    """A named variant of a model. Entering `applied()` yields the model to run; leaving it restores what was there."""

    name: str
    applied: Callable[[], AbstractContextManager[PreTrainedModel]]


def fixed_state(name: str, model: PreTrainedModel) -> ModelState:
    """The state of a model that nothing has to be done to: the 16-bit model, or an export that was loaded."""
    return ModelState(name, lambda: nullcontext(model))


class _Text(NamedTuple):
    """A tokenized sentence; `skipped` leading tokens (0 or 1) have no prediction, nor do their bytes count."""

    ids: tuple[int, ...]
    skipped: int
    bytes_: int


class _Row(NamedTuple):
    """One window of a sentence as the model reads it; it scores the tokens `ids[first:]`."""

    language: str
    sentence: int
    ids: tuple[int, ...]
    first: int


class _Batch(NamedTuple):
    """Right-padded rows. `positions` index the flattened [rows · width] logits; all others have one entry a target."""

    rows: Sequence[_Row]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor


def score_states(
    states: Sequence[ModelState],
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    *,
    batch_tokens: int = 2048,
    context: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StateScores]:
    """Scores of every state on every sentence, sentences in the order of the text set.

    Each token is scored once, given BOS (else EOS) and the text before it. Where the tokenizer has neither, the first
    token and its bytes are left out. A sentence longer than the context is read in windows that overlap by half.
    Numbers have the 7 significant digits that float32 arithmetic can vouch for.

    Args:
        states: the 16-bit model first: KL and flips of the others are measured against it.
        tokenizer: of all states.
        texts: sentences to score; take a part of a text set with `TextSet.part`.
        batch_tokens: tokens in a batch, padding included; a longer sentence makes a batch of its own.
        context: longest window in tokens, BOS included (the model's own limit where that is less).
        progress: called with (done, total) batches times states.

    Raises:
        ConfigError: no state, two of one name, a limit too small, or a sentence without a token to score.
        UnsupportedModelError: no BOS, no EOS and no character offsets; or states of different vocabularies.
        ArtifactError: a state predicts NaN or infinity.
    """
    _check_arguments(states, batch_tokens, context)
    with states[0].applied() as model:
        window = min(context, _position_limit(model))
    encoded = {language: _encode(tokenizer, language, texts) for language in texts.languages}
    prefix = _prefix(tokenizer)
    rows = [
        _Row(language, index, ids, first)
        for language, sentences in encoded.items()
        for index, text in enumerate(sentences)
        for ids, first in _windows(text.ids, prefix, window)
    ]
    batches = list(_batches(rows, batch_tokens))
    totals = {state.name: {language: np.zeros((3, len(texts))) for language in encoded} for state in states}
    for number, batch in enumerate(batches):
        for offset, (name, scores) in enumerate(_score_batch(states, _tensors(batch), texts)):
            for row, score in zip(batch, scores, strict=True):
                totals[name][row.language][:, row.sentence] += score
            if progress is not None:
                progress(number * len(states) + offset + 1, len(batches) * len(states))
    return {name: StateScores(state=name, languages=_finish(found, encoded)) for name, found in totals.items()}


def _check_arguments(states: Sequence[ModelState], batch_tokens: int, context: int) -> None:
    names = [state.name for state in states]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"states {names}: give at least one, the 16-bit model first, each with a name of its own")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens}: a batch needs at least 1 token; the default is 2048")
    if context < SMALLEST_CONTEXT:
        raise ConfigError(f"context={context}: a window needs at least {SMALLEST_CONTEXT} tokens; the default is 2048")


def _position_limit(model: PreTrainedModel) -> int:
    """The longest input of the model; models without learned or rotary positions (BLOOM) name none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit >= SMALLEST_CONTEXT else sys.maxsize


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands before every text: BOS, else EOS, else none."""
    identifier = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if identifier is None else int(identifier)


def _encode(tokenizer: PreTrainedTokenizerBase, language: str, texts: TextSet) -> list[_Text]:
    skipped = 1 if _prefix(tokenizer) is None else 0
    if skipped and not tokenizer.is_fast:
        raise UnsupportedModelError(
            "the tokenizer has no BOS, no EOS and no character offsets, so that the bytes of the first token are "
            "unknown; set tokenizer.bos_token, or use its fast version"
        )
    sentences = texts.sentences[language]
    encoding = tokenizer(list(sentences), add_special_tokens=False, return_offsets_mapping=bool(skipped), verbose=False)
    found = []
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
        found.append(_Text(ids, skipped, bytes_))
    _warn_of_unknown_tokens(tokenizer, language, found)
    return found


def _first_token_bytes(
    tokenizer: PreTrainedTokenizerBase, sentence: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> int:
    if offsets[1][0] >= offsets[0][1]:
        return len(sentence[: offsets[0][1]].encode())
    # The token ends inside a character. Byte fallback spells a byte as <0xE4>, byte-level BPE as one symbol.
    token = str(tokenizer.convert_ids_to_tokens(ids[0]))
    return 1 if token.startswith("<0x") else len(token)


def _warn_of_unknown_tokens(tokenizer: PreTrainedTokenizerBase, language: str, texts: Sequence[_Text]) -> None:
    if tokenizer.unk_token_id is None:
        return
    unknown = sum(text.ids.count(tokenizer.unk_token_id) for text in texts)
    share = unknown / sum(len(text.ids) for text in texts)
    if share > UNKNOWN_SHARE:
        logger.warning(
            "%s: %.1f %% of the tokens are unknown to the tokenizer; its scores mean little", language, 100 * share
        )


def _windows(ids: tuple[int, ...], prefix: int | None, size: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Windows of at most `size` tokens, and in each the first token that no earlier window scored.

    Every window starts with the prefix, because models that were trained with one predict badly without it.
    """
    lead = () if prefix is None else (prefix,)
    room = size - len(lead)
    start, scored = 0, 1 - len(lead)
    while scored < len(ids):
        chunk = ids[start : start + room]
        yield lead + chunk, len(lead) + scored - start
        scored = start + len(chunk)
        start += room // 2


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows of similar length together, longest first, so that memory runs out at once or never."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _tensors(rows: Sequence[_Row]) -> _Batch:
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
    return _Batch(rows, ids, mask, torch.tensor(positions), torch.tensor(targets), torch.tensor(owners))


def _score_batch(states: Sequence[ModelState], batch: _Batch, texts: TextSet) -> Iterator[tuple[str, Array]]:
    """Each state's name with its sums of NLL, KL and flips over the targets of each row: [rows, 3]."""
    reference: Tensor | None = None
    for state in states:
        with state.applied() as model:
            logits = _logits(model, batch, state.name)
        if reference is None:
            reference = torch.empty(len(batch.targets), logits.shape[-1], device=logits.device)
            per_token = _score_reference(logits, batch, reference)
        elif reference.shape[-1] != logits.shape[-1]:
            raise UnsupportedModelError(
                f"state {state.name!r} has {logits.shape[-1]} logits and {states[0].name!r} {reference.shape[-1]}: "
                "their distributions cannot be compared; score variants of one model"
            )
        else:
            per_token = _score_against(logits, batch, reference)
        per_row = torch.zeros(len(batch.rows), 3, dtype=torch.float64).index_add_(0, batch.owners, per_token)
        _check_finite(per_row, batch, state.name, texts)
        yield state.name, per_row.numpy()


def _logits(model: PreTrainedModel, batch: _Batch, name: str) -> Tensor:
    """Flattened logits [rows · width, vocabulary]."""
    if model.training:
        raise ConfigError(f"state {name!r} is in training mode, where dropout makes scores random; call model.eval()")
    with torch.no_grad():
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.flatten(0, 1)


def _chunks(logits: Tensor, batch: _Batch) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces of the targets: their slice, float32 log-probabilities [piece, vocabulary], and target ids [piece, 1]."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(batch.targets), size):
        piece = slice(start, start + size)
        chosen = logits[batch.positions[piece].to(logits.device)]
        log_probabilities = torch.log_softmax(chosen.float(), dim=-1)
        yield piece, log_probabilities, batch.targets[piece, None].to(logits.device)


def _score_reference(logits: Tensor, batch: _Batch, reference: Tensor) -> Tensor:
    """Scores of the 16-bit model [targets, 3]; its log-probabilities are written to `reference`."""
    scores = torch.zeros(len(batch.targets), 3, dtype=torch.float64)
    for piece, log_probabilities, targets in _chunks(logits, batch):
        reference[piece] = log_probabilities
        scores[piece, NLL] = -log_probabilities.gather(1, targets)[:, 0].double().cpu()
    return scores


def _score_against(logits: Tensor, batch: _Batch, reference: Tensor) -> Tensor:
    """Scores of another state [targets, 3] against the 16-bit model's log-probabilities [targets, vocabulary]."""
    scores = torch.zeros(len(batch.targets), 3, dtype=torch.float64)
    for piece, log_probabilities, targets in _chunks(logits, batch):
        expected = reference[piece].to(logits.device)
        kl = torch.nn.functional.kl_div(log_probabilities, expected, reduction="none", log_target=True)
        scores[piece, NLL] = -log_probabilities.gather(1, targets)[:, 0].double().cpu()
        scores[piece, KL] = kl.sum(dim=-1, dtype=torch.float64).cpu()
        scores[piece, FLIPS] = (log_probabilities.argmax(dim=-1) != expected.argmax(dim=-1)).double().cpu()
    return scores


def _check_finite(scores: Tensor, batch: _Batch, name: str, texts: TextSet) -> None:
    broken = (~torch.isfinite(scores).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        row = batch.rows[broken[0]]
        raise ArtifactError(
            f"state {name!r} predicts NaN or infinity on {row.language} sentence {texts.ids[row.sentence]!r}; every "
            "logit must be a finite number. Look for NaN or overflow in its weights and scales."
        )


def _finish(found: dict[str, Array], encoded: dict[str, list[_Text]]) -> dict[str, LanguageScores]:
    return {
        language: LanguageScores(
            nll_nats=tuple(significant(value) for value in sums[NLL].tolist()),
            tokens=tuple(len(text.ids) - text.skipped for text in encoded[language]),
            bytes_=tuple(text.bytes_ for text in encoded[language]),
            # Rounding can push the KL of two nearly equal states a little below its bound.
            kl_nats=tuple(significant(max(0.0, value)) for value in sums[KL].tolist()),
            flips=tuple(round(value) for value in sums[FLIPS].tolist()),
        )
        for language, sums in found.items()
    }
