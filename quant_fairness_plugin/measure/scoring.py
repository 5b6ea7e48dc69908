"""Per-sentence scores of model states; the only module of this package that runs models.

Takes model states and a `TextSet`; returns `StateScores`: negative log-likelihood, KL to the first state over the full
vocabulary and top-1 flips of every sentence. Batches are the outer loop and states the inner one, so that the 16-bit
model's probabilities of a batch serve all states and at most two [tokens, vocabulary] tensors are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import StateScores, TextSet
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.rows import (
    FLIPS,
    KL,
    NLL,
    Array,
    Batch,
    sum_rows,
    tokenize_for,
)
from quant_fairness_plugin.model.context import SMALLEST_CONTEXT
from quant_fairness_plugin.model.devices import wide_dtype

CHUNK_ELEMENTS = 1 << 22
"""Probabilities are compared in pieces of so many elements (16 MiB in float32)."""


class ModelState(NamedTuple):
    """A named variant of a model. Entering `applied()` yields the model to run; leaving it restores what was there."""

    name: str
    applied: Callable[[], AbstractContextManager[PreTrainedModel]]


def fixed_state(name: str, model: PreTrainedModel) -> ModelState:
    """Return the state of a model that is used as it is: the 16-bit model, or an export that was loaded."""
    return ModelState(name, lambda: nullcontext(model))


def score_states(
    states: Sequence[ModelState],
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    *,
    batch_tokens: int = 2048,
    context: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StateScores]:
    """Score every state on every sentence, sentences in the order of the text set.

    Each token is scored once, given BOS (else EOS) and the text before it. Where the tokenizer has neither, the first
    token and its bytes are left out. A sentence longer than the context is read in windows that overlap by half.
    Numbers have the 7 significant digits that float32 arithmetic can vouch for.

    Args:
        states: the 16-bit model first: KL and flips of the others are measured against it.
        tokenizer: of all states.
        texts: sentences to score; take a part of a text set with `TextSet.part`.
        batch_tokens: tokens in a batch, padding included; a longer sentence makes a batch alone.
        context: longest window in tokens, BOS included (the model's limit where that is less).
        progress: called with (done, total) batches times states.

    Raises:
        ConfigError: no state, two of one name, a limit too small, or a sentence without a token to score.
        UnsupportedModelError: no BOS, no EOS and no character offsets; or states of different vocabularies.
        ArtifactError: a state predicts NaN or infinity, or a token has no embedding.
    """
    _check_arguments(states, batch_tokens, context)
    with states[0].applied() as model:
        tokenized = tokenize_for(model, tokenizer, texts, context=context)
    batches = tokenized.batches(batch_tokens)
    totals = {state.name: tokenized.empty_totals() for state in states}
    for number, batch in enumerate(batches):
        for offset, (name, scores) in enumerate(_score_batch(states, batch, texts)):
            for row, score in zip(batch.rows, scores, strict=True):
                totals[name][row.language][:, row.sentence] += score
            if progress is not None:
                progress(number * len(states) + offset + 1, len(batches) * len(states))
    return {name: tokenized.state_scores(name, sums) for name, sums in totals.items()}


def _check_arguments(states: Sequence[ModelState], batch_tokens: int, context: int) -> None:
    names = [state.name for state in states]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"states {names}: give at least one, the 16-bit model first, no two of one name")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens}: a batch needs at least 1 token; the default is 2048")
    if context < SMALLEST_CONTEXT:
        raise ConfigError(f"context={context}: a window needs at least {SMALLEST_CONTEXT} tokens; the default is 2048")


def _score_batch(states: Sequence[ModelState], batch: Batch, texts: TextSet) -> Iterator[tuple[str, Array]]:
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
        yield state.name, sum_rows(batch, per_token, state.name, texts)


def _logits(model: PreTrainedModel, batch: Batch, name: str) -> Tensor:
    """Flattened logits [rows · width, vocabulary]."""
    if model.training:
        raise ConfigError(f"state {name!r} is in training mode, where dropout makes scores random; call model.eval()")
    with torch.no_grad():
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.flatten(0, 1)


def _chunks(logits: Tensor, batch: Batch) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces of the targets: their slice, float32 log-probabilities [piece, vocabulary], and target ids [piece, 1]."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(batch.targets), size):
        piece = slice(start, start + size)
        predicting = logits[batch.positions[piece].to(logits.device)]
        log_probabilities = torch.log_softmax(predicting.float(), dim=-1)
        yield piece, log_probabilities, batch.targets[piece, None].to(logits.device)


def _score_reference(logits: Tensor, batch: Batch, reference: Tensor) -> Tensor:
    """Scores of the 16-bit model [targets, 3]; its log-probabilities are written to `reference`."""
    scores = torch.zeros(len(batch.targets), 3, dtype=torch.float64)
    for piece, log_probabilities, targets in _chunks(logits, batch):
        reference[piece] = log_probabilities
        scores[piece, NLL] = -log_probabilities.gather(1, targets)[:, 0].cpu().double()
    return scores


def _score_against(logits: Tensor, batch: Batch, reference: Tensor) -> Tensor:
    """Scores of another state [targets, 3] against the 16-bit model's log-probabilities [targets, vocabulary]."""
    scores = torch.zeros(len(batch.targets), 3, dtype=torch.float64)
    for piece, log_probabilities, targets in _chunks(logits, batch):
        expected = reference[piece].to(logits.device)
        kl = torch.nn.functional.kl_div(log_probabilities, expected, reduction="none", log_target=True)
        scores[piece, NLL] = -log_probabilities.gather(1, targets)[:, 0].cpu().double()
        scores[piece, KL] = kl.sum(dim=-1, dtype=wide_dtype(kl.device)).cpu()
        scores[piece, FLIPS] = (log_probabilities.argmax(dim=-1) != expected.argmax(dim=-1)).cpu().double()
    return scores
