"""Language weights that lower the damage of whichever language has most of it.

Takes a way to quantize with a `CalibrationSet`; returns the `QuantizedModel` of the best round, whose calibration holds
the weights and all rounds. Multiplicative weights (Arora, Hazan and Kale 2012, doi 10.4086/toc.2012.v008a006):
quantize, measure each language on the calibration text, raise the weight of those that lost most, and again. Sentences
that plans are chosen or judged on are never read.

A language that the 16-bit model does not support keeps the weight that it started with: its KL is often the largest of
all, although it has nothing to lose, and would draw the weights to itself. A language that collapses does count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from quant_fairness_plugin.artifacts import LanguageScores, TextSet
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.measure import guards, metrics
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.measure.scoring import block_state, score_states
from quant_fairness_plugin.quantize.calibration import CalibrationSet, MinimaxRound
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.quantized import QuantizedModel

_logger = logging.getLogger(__name__)

ROUNDS = 6
PATIENCE = 2
"""Rounds without improvement that end the search: rounding makes the KL of one round after another jump a little."""
STEP = 1.0
"""The worst language's weight grows by a factor e a round against a language without damage."""

Quantize = Callable[[CalibrationSet], QuantizedModel]


def quantize_calibrated(quantize: Quantize, calibration: CalibrationSet, texts: TextSet) -> QuantizedModel:
    """Quantize with a calibration as its weighting says: once, or with `minimax` until the weights are settled.

    Args:
        quantize: `quantize_model` with all arguments but the calibration.
        calibration: token rows; where its weighting is `minimax`, with the weights to start from.
        texts: the text set that it was built from; only the part `calibrate` is read.

    Raises:
        QualityGateError: `minimax`, and the 16-bit model supports none of the languages.
    """
    return (
        quantize_minimax(quantize, calibration, texts) if calibration.weighting == "minimax" else quantize(calibration)
    )


def quantize_minimax(
    quantize: Quantize, calibration: CalibrationSet, texts: TextSet, *, rounds: int = ROUNDS, step: float = STEP
) -> QuantizedModel:
    """Return the quantized model whose worst language loses least on the calibration text, over all rounds tried.

    The first round has the weights of the calibration, so the result is never worse *on that text* than those.

    Args:
        quantize: `quantize_model` with all arguments but the calibration.
        calibration: token rows, and the weights to start from.
        texts: the text set that it was built from; only the part `calibrate` is read.
        rounds: most times that the model is quantized.
        step: logarithm of the factor by which the worst language's weight grows in a round.

    Returns:
        The model of the best round; its calibration has that round's weights and the `rounds` tried.

    Raises:
        ConfigError: no rounds, a step that is not positive, or fewer than two calibration sentences.
        QualityGateError: the 16-bit model supports none of the languages.
    """
    if rounds < 1 or step <= 0:
        raise ConfigError(f"{rounds} rounds with step {step}: use at least 1 round and a step above 0, such as {STEP}")
    part = texts.part("calibrate").choose(tuple(calibration.rows))
    best: QuantizedModel | None = None
    tried: list[MinimaxRound] = []
    best_round, weights = 0, calibration.shares
    while len(tried) < rounds and len(tried) - best_round <= PATIENCE:
        used = replace(calibration, weights=weights, weighting="minimax")
        quantized = quantize(used)
        outcome = MinimaxRound(weights, calibration_damage(quantized, part))
        _logger.info("round %d: worst %s, KL %.5f bits per byte", len(tried), outcome.worst, outcome.worst_kl)
        if best is None or outcome.worst_kl < tried[best_round].worst_kl:
            best, best_round = replace(quantized, calibration=used), len(tried)
        tried.append(outcome)
        weights = raised_weights(weights, outcome.kl_bits_per_byte, step=step)
    assert best is not None
    assert best.calibration is not None
    return replace(best, calibration=replace(best.calibration, rounds=tuple(tried)))


def raised_weights(weights: Mapping[str, float], damage: Mapping[str, float], *, step: float) -> dict[str, float]:
    """Return the next round's weights: w · exp(step · KL / largest KL), for the languages of `damage` only.

    Their sum stays what it was, and so does every other language's weight.

    Args:
        weights: language → weight.
        damage: language → KL in bits per byte, for the languages to weigh.
        step: logarithm of the factor of the worst one.
    """
    largest = max(damage.values())
    if largest <= 0:
        return dict(weights)
    grown = {name: weights[name] * math.exp(step * kl / largest) for name, kl in damage.items()}
    scale = sum(weights[name] for name in damage) / sum(grown.values())
    return dict(weights) | {name: significant(value * scale) for name, value in grown.items()}


def calibration_damage(quantized: QuantizedModel, part: TextSet) -> dict[str, float]:
    """Return the KL to the 16-bit model in bits per byte, of the languages that it supports.

    Raises:
        QualityGateError: it supports none of them.
    """
    baseline = block_state("16 bit", quantized.loaded)
    scores = score_states([baseline, quantized_state("quantized", quantized)], quantized.loaded.tokenizer, part)
    before, after = scores["16 bit"].languages, scores["quantized"].languages
    counted = [name for name in part.languages if _supported(before[name], part.sentences[name])]
    if not counted:
        raise QualityGateError(
            f"the 16-bit model supports none of {', '.join(part.languages)}, so that there is no worst language to "
            "help; calibrate a trained model, or with uniform weights"
        )
    return {
        name: significant(metrics.kl_bits_per_byte(sum(after[name].kl_nats), sum(after[name].bytes_)))
        for name in counted
    }


def _supported(scores: LanguageScores, sentences: tuple[str, ...]) -> bool:
    spent = metrics.bits_per_byte(sum(scores.nll_nats), float(sum(scores.bytes_)))
    return guards.support(spent, guards.byte_unigram_bpb(sentences)) is None
