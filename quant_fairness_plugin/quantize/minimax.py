"""Language weights that lower the damage of whichever language has most of it.

Takes a way to quantize with a `CalibrationSet`; returns the `QuantizedModel`, whose calibration holds the weights and
what they were made of: each language's damage when all weights are rounded to nearest, which takes one more pass over
the calibration sentences and no second quantization. Rounding orders languages much as GPTQ does on the same
grid (`docs/calibration.md`). Sentences that plans are chosen or judged on are never read.

A language that the 16-bit model does not support keeps the weight that it started with: its KL is often the largest of
all, although it has nothing to lose, and would draw the weights to itself. A language that collapses does count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from quant_fairness_plugin.artifacts import LanguageScores, ProtectionPlan, TextSet
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.measure import guards, metrics
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.measure.scoring import block_state, score_states
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.methods.rtn import Rtn
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.stream import quantize_model

_logger = logging.getLogger(__name__)

POWER = 1.0
"""Of a language's damage over the mean: at 0 all weights are equal, and far above 1 the worst language has them all."""
MOST_SENTENCES = 16
"""Of each language that damage is measured on, so that the weights cost a small part of what quantizing does."""


def quantize_calibrated(
    quantize: Callable[[CalibrationSet], QuantizedModel],
    nearest: Callable[[], QuantizedModel],
    calibration: CalibrationSet,
    texts: TextSet,
) -> QuantizedModel:
    """Quantize with a calibration; where its weighting is `minimax`, with the weights that `minimax_weights` gives.

    Args:
        quantize: `quantize_model` with all arguments but the calibration.
        nearest: `quantize_nearest` of the same model and plan; called for `minimax` only.
        calibration: token rows; where its weighting is `minimax`, with the weights to start from.
        texts: the text set that it was built from; only the part `calibrate` is read.

    Returns:
        The model; under `minimax` its calibration has the weights and what they come from.

    Raises:
        QualityGateError: `minimax`, and the 16-bit model supports none of the languages.
    """
    if calibration.weighting != "minimax":
        return quantize(calibration)
    part = texts.part("calibrate").choose(tuple(calibration.rows))
    damage = calibration_damage(nearest(), part.take(range(min(len(part), MOST_SENTENCES))))
    _logger.info("rounded to nearest: %s", ", ".join(f"{name} {kl:.5f}" for name, kl in damage.items()))
    return quantize(replace(calibration, weights=minimax_weights(calibration.shares, damage), nearest_kl=damage))


def quantize_nearest(loaded: LoadedModel, plan: ProtectionPlan) -> QuantizedModel:
    """Round to nearest what a plan quantizes: whole matrices, and scales that no calibration fits."""
    clip = plan.grid.clip if plan.grid.clip in Rtn.clips else "mse"
    plain = replace(plan, grid=replace(plan.grid, clip=clip), protect_columns=0.0)
    return quantize_model(loaded, plain, method=Rtn())


def minimax_weights(
    weights: Mapping[str, float], damage: Mapping[str, float], *, power: float = POWER
) -> dict[str, float]:
    """Return w · KL^power for the languages of `damage`, scaled so that all weights add up to what they did.

    Args:
        weights: language → weight.
        damage: language → KL in bits per byte, for the languages to weigh.
        power: how much damage counts.
    """
    grown = {name: weights[name] * max(kl, 0.0) ** power for name, kl in damage.items()}
    if not sum(grown.values()):
        return dict(weights)
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
