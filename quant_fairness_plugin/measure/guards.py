"""What must be reported as such and never ranked: collapsed states and unsupported languages.

Takes numbers and sentences; returns the reason as one sentence, or None where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array

Indices = NDArray[np.int64]

CHANCE_SHARE = 0.9
UNIFORM_BITS_PER_BYTE = 8.0
PERPLEXITY_FACTOR = 10.0
UNKNOWN_SHARE = 0.1
"""Of a language's tokens, the most that may be unknown for its figures to mean something."""
SMOOTHING = 0.5
"""Krichevsky-Trofimov: close to the best that a byte count can do on a text of unknown length."""
ORDER = 3
"""Bytes in a row that the n-gram knows: the longest that a few thousand bytes say something of."""


def byte_unigram_bpb(sentences: Sequence[str], folds: int = 5) -> float:
    """Return the bits per byte of a model that knows only byte frequencies, cross-fitted on the same sentences.

    Sentence i is scored by the bytes of the sentences outside its fold (i modulo `folds`), so that no sentence helps to
    predict itself.

    Raises:
        ConfigError: fewer than 2 sentences, fewer than 2 folds, or no bytes at all.
    """
    if len(sentences) < 2 or folds < 2:
        raise ConfigError(f"{len(sentences)} sentence(s) in {folds} fold(s): cross-fitting needs at least 2 of each")
    counts = np.stack([_byte_counts(sentences[fold::folds]) for fold in range(min(folds, len(sentences)))])
    if not counts.any():
        raise ConfigError("all sentences are empty: bits per byte need text")
    return sum(_unigram_bits(counts.sum(axis=0) - held_out, held_out) for held_out in counts) / float(counts.sum())


def _byte_counts(sentences: Sequence[str]) -> Array:
    return np.bincount(np.frombuffer("".join(sentences).encode(), dtype=np.uint8), minlength=256).astype(np.float64)


def _unigram_bits(training: Array, held_out: Array) -> float:
    probabilities = (training + SMOOTHING) / (training.sum() + 256 * SMOOTHING)
    return float(-held_out @ np.log2(probabilities))


def byte_ngram_bpb(sentences: Sequence[str], folds: int = 5) -> float:
    """Return the bits per byte of a model that knows which byte follows which `ORDER - 1`, cross-fitted as above.

    Contexts of every length are interpolated by how many different bytes followed them (Witten and Bell, method C).

    Raises:
        ConfigError: fewer than 2 sentences, fewer than 2 folds, or no bytes at all.
    """
    if len(sentences) < 2 or folds < 2:
        raise ConfigError(f"{len(sentences)} sentence(s) in {folds} fold(s): cross-fitting needs at least 2 of each")
    lead = bytes(ORDER - 1)
    every = np.frombuffer(b"".join(lead + text.encode() for text in sentences), dtype=np.uint8).astype(np.int64)
    sizes = [len(text.encode()) for text in sentences]
    if not sum(sizes):
        raise ConfigError("all sentences are empty: bits per byte need text")
    owner = np.repeat(np.arange(len(sizes)), sizes)
    at = np.arange(len(owner)) + (ORDER - 1) * (owner + 1)  # of the bytes that are predicted
    probability = np.full(len(at), 1 / 256)
    for length in range(ORDER):
        context = sum((every[at - back] << (8 * (back - 1)) for back in range(1, length + 1)), np.zeros_like(at))
        _interpolate(probability, context, every[at], owner % folds)
    return float(-np.log2(probability).mean())


def _interpolate(probability: Array, context: Indices, following: Indices, fold: Indices) -> None:
    """Mix what contexts of one length say, learned outside of each byte's fold, into what shorter ones say."""
    _, contexts = np.unique(context, return_inverse=True)
    pairs, pair = np.unique(contexts * 256 + following, return_inverse=True)
    for number in np.unique(fold):
        out = fold == number
        counts = np.bincount(pair[~out], minlength=len(pairs))
        seen = np.bincount(contexts[~out], minlength=contexts.max() + 1)
        kinds = np.bincount(pairs[counts > 0] // 256, minlength=len(seen))
        total, different = seen[contexts[out]], kinds[contexts[out]]
        mixed = (counts[pair[out]] + different * probability[out]) / np.maximum(total + different, 1)
        probability[out] = np.where(total > 0, mixed, probability[out])


def support(baseline_bpb: float, unigram_bpb: float) -> str | None:
    """Return why the 16-bit model does not support a language, or None: it must beat byte unigrams on the same text."""
    if baseline_bpb < unigram_bpb:
        return None
    return (
        f"the 16-bit model needs {baseline_bpb:.2f} bits per byte, no better than counting bytes ({unigram_bpb:.2f}): "
        "there is nothing to lose"
    )


def spelling(unknown: int, tokens: int) -> str | None:
    """Return why nothing can be said of a language that the tokenizer cannot spell, or None.

    A token for unknown text is easy to predict, whatever the text was: the model seems to know the language well.
    """
    share = unknown / tokens
    if share <= UNKNOWN_SHARE:
        return None
    return f"{share:.0%} of its tokens stand for text that the tokenizer cannot spell"


def weakness(baseline_bpb: float, ngram_bpb: float) -> str | None:
    """Return why the 16-bit model hardly speaks a language that it supports, or None: it must beat a byte n-gram."""
    if baseline_bpb < ngram_bpb:
        return None
    return (
        f"weak: the 16-bit model needs {baseline_bpb:.2f} bits per byte, no better than {ORDER} bytes in a row learned "
        f"from the other sentences ({ngram_bpb:.2f})"
    )


def collapse(
    *, nats_per_token: float, bits_per_byte: float, perplexity: float, baseline_perplexity: float, vocabulary: int
) -> str | None:
    """Return why a quantized model counts as no better than chance on a language, or None.

    Args:
        nats_per_token: of the quantized model.
        bits_per_byte: of the quantized model.
        perplexity: of the quantized model, per token.
        baseline_perplexity: of the 16-bit model, on the same tokens.
        vocabulary: entries of the vocabulary; uniform guessing costs ln(vocabulary) nats per token.
    """
    chance = CHANCE_SHARE * math.log(vocabulary)
    if nats_per_token >= chance:
        return (
            f"{nats_per_token:.2f} nats per token, at or above {CHANCE_SHARE} · ln {vocabulary} = {chance:.2f} (chance)"
        )
    if bits_per_byte >= UNIFORM_BITS_PER_BYTE:
        return f"{bits_per_byte:.2f} bits per byte, no better than random bytes (8)"
    if perplexity > PERPLEXITY_FACTOR * baseline_perplexity:
        return (
            f"perplexity {perplexity:.4g} is more than {PERPLEXITY_FACTOR:g} times the 16-bit {baseline_perplexity:.4g}"
        )
    return None
