"""`measure_disparity`: a model that was quantized in place against the weights that it had before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import Bootstrap, Measurement, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.measurement import measure_states
from quant_fairness_plugin.measure.metrics import percent_change
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state
from quant_fairness_plugin.model.load import from_loaded
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.seeds.computing import in_float32
from quant_fairness_plugin.seeds.disparity import Groups, disparity, perplexities
from quant_fairness_plugin.seeds.simulation import is_simulated, original_weights
from quant_fairness_plugin.seeds.texts import Method, one_text_each, text_set
from quant_fairness_plugin.texts.parts import Sample

SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class DisparityResult:
    """The result of `measure_disparity`; a field without something to compare with is `Undefined`, with the reason."""

    degradation: dict[str, float] | Undefined
    """Percent change of token perplexity by language."""
    average_disparity: float | Undefined
    """D1; lower than 1 means that the other languages lost less than the reference, also where all lost much."""
    max_disparity: float | Undefined
    measurement: Measurement | Undefined
    """The rigorous measurement, with intervals; undefined under `method="legacy"`."""


def measure_disparity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | TextSet | None = None,
    baseline: Mapping[str, float] | None = None,
    reference_lang: str = "en",
    *,
    method: Method = "rigorous",
) -> DisparityResult:
    """Measure what quantizing in place did to each language, against the weights that `simulate_int4` remembered.

    Args:
        model: a model after `simulate_int4`.
        tokenizer: its tokenizer.
        texts: as for `layer_sweep`; the rigorous default is the bundled `confirm` part.
        baseline: legacy perplexities by language to compare with, where the model does not remember its weights
            (`method="legacy"` only).
        reference_lang: language that disparity is measured against.
        method: `rigorous` or `legacy`.

    Raises:
        ConfigError: a baseline together with `method="rigorous"`, which needs the 16-bit model itself.
    """
    if method == "rigorous" and baseline is not None:
        raise ConfigError('baseline perplexities can only be used with method="legacy"; leave them out')
    if baseline is None and not is_simulated(model):
        nothing = Undefined("the model carries no original weights to compare with: call simulate_int4 on it first")
        return DisparityResult(nothing, nothing, nothing, nothing)
    if method == "legacy":
        return _legacy_disparity(model, tokenizer, one_text_each(texts), baseline, reference_lang)
    sentences = text_set(texts, reference_lang)
    measurement = _measure_simulated(model, tokenizer, sentences, reference_lang)
    known = {row.language: row.perplexity_change_percent for row in measurement.languages if row.status == "supported"}
    if reference_lang not in known:
        nothing = Undefined(
            f"the 16-bit model does not support the reference language {reference_lang}, or it collapsed"
        )
        return DisparityResult(known, nothing, nothing, measurement)
    groups = Groups(reference=reference_lang)
    return DisparityResult(
        known, disparity("D1", known, groups=groups), disparity("max", known, groups=groups), measurement
    )


def _legacy_disparity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    baseline: Mapping[str, float] | None,
    reference: str,
) -> DisparityResult:
    if baseline is None:
        with original_weights(model) as original:
            baseline = perplexities(original, tokenizer, texts)
    after = perplexities(model, tokenizer, {language: texts[language] for language in baseline})
    change = {language: percent_change(baseline[language], after[language]) for language in after}
    groups = Groups(reference=reference)
    return DisparityResult(
        change,
        disparity("D1", change, groups=groups),
        disparity("max", change, groups=groups),
        Undefined('method="legacy" has no intervals'),
    )


def _measure_simulated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: TextSet, reference: str
) -> Measurement:
    loaded = in_float32(from_loaded(model, tokenizer))
    return measure_states(
        ModelState(BASELINE, lambda: original_weights(loaded.model)),
        [fixed_state(SIMULATED, loaded.model)],
        tokenizer,
        Sample.of(texts, "confirm"),
        provenance=lambda given: provenance(loaded, texts, seed=0, arguments=given),
        bootstrap=Bootstrap(reference),
    ).measurements[SIMULATED]
