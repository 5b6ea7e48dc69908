"""The calls of the research scripts that this library grew out of ("the seeds"), with their signatures.

    from quant_fairness import quick_sweep, simulate_int4

They work on a model and tokenizer that are already in memory, and `simulate_int4` changes the model in place, as the
seeds do. Measuring is rigorous by default; `method="legacy"` is the seeds' own: one sentence a language, one scale per
tensor, ratios of perplexity changes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import Bootstrap, Grid, Measurement, Ranking, SweepReport, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.measurement import measure_states
from quant_fairness_plugin.measure.metrics import percent_change
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.load import LoadedModel, from_loaded
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.controls import gateway_layers
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.seeds.disparity import DEFAULT_TEXTS, Groups, disparity, perplexities
from quant_fairness_plugin.seeds.simulation import (
    is_simulated,
    original_weights,
    protect_layers,
    simulate_int4,
    undo_simulation,
)
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.texts.load import load_texts

__all__ = [
    "DisparityResult",
    "LegacySweepRow",
    "fair_quantize",
    "layer_sweep",
    "measure_disparity",
    "protect_layers",
    "quantize_except",
    "quick_sweep",
    "simulate_int4",
    "undo_simulation",
]

SEED_LANGUAGES = ("en", "he", "ar", "zh")
"""The languages of the seeds' package when none are named."""
SIMULATED = "simulated"
Method = Literal["rigorous", "legacy"]


@dataclass(frozen=True, slots=True)
class LegacySweepRow:
    """One layer of a legacy sweep: everything quantized but this layer."""

    layer: int
    disparity: float | Undefined
    """D1: mean over the other languages of their degradation over the reference's."""
    degradation: dict[str, float]
    """Percent change of perplexity by language."""


@dataclass(frozen=True, slots=True)
class DisparityResult:
    """What `measure_disparity` found; a field that has nothing to be compared with is `Undefined`, with the reason."""

    degradation: dict[str, float] | Undefined
    """Percent change of token perplexity by language."""
    average_disparity: float | Undefined
    """D1; lower than 1 means that the other languages lost less than the reference, also where all lost much."""
    max_disparity: float | Undefined
    measurement: Measurement | Undefined
    """The rigorous measurement, with intervals; undefined under `method="legacy"`."""


def layer_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | TextSet | None = None,
    *,
    method: Method = "rigorous",
    reference_lang: str = "en",
    grid: Grid | None = None,
) -> SweepReport | tuple[LegacySweepRow, ...]:
    """Protect each layer in turn with all others quantized. The model is left as it was.

    Args:
        model: a 16- or 32-bit causal language model.
        tokenizer: its tokenizer.
        texts: a `TextSet`; for `legacy` a text per language. Default: the bundled sentences (`search` part) in en, he,
            ar and zh; for `legacy` the seeds' one sentence in each of them.
        method: `rigorous` (a `SweepReport`: KL and bits per byte, group-wise INT4) or `legacy` (the seeds' rows, the
            layer with the lowest disparity first).
        reference_lang: language that disparity is measured against.
        grid: grid of the quantized layers, INT4 in groups of 128 by default; `legacy` has its own.

    Raises:
        ConfigError: texts of the wrong kind, or a model that already carries a simulation.
    """
    if is_simulated(model):
        raise ConfigError("the model is already quantized by simulate_int4; take it back with undo_simulation first")
    if method == "legacy":
        return _legacy_sweep(model, tokenizer, _legacy_texts(texts), reference_lang)
    chosen = _text_set(texts, reference_lang).part("search")
    return sweep_units(_in_float32(from_loaded(model, tokenizer)), chosen, grid=grid, reference=reference_lang)


def quick_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | TextSet | None = None,
    top_n: int = 3,
    *,
    method: Method = "rigorous",
    reference_lang: str = "en",
    grid: Grid | None = None,
) -> list[int]:
    """The `top_n` layers most worth protecting, ascending. The model is left as it was.

    Takes the arguments of `layer_sweep`. By `rigorous` the layers are those whose protection leaves the worst-hit
    language best off, by `legacy` those with the lowest disparity.

    Raises:
        ConfigError: as `layer_sweep`; or the layers cannot be ranked (no language is supported, say).
    """
    swept = layer_sweep(model, tokenizer, texts, method=method, reference_lang=reference_lang, grid=grid)
    if isinstance(swept, SweepReport):
        ranking = swept.rankings["protect-one worst"]
        if not isinstance(ranking, Ranking):
            raise ConfigError(f"layers cannot be ranked: {ranking.undefined}; give texts that the model supports")
        order = ranking.layers
    else:
        order = tuple(row.layer for row in swept)
    return sorted(order[:top_n])


def measure_disparity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | TextSet | None = None,
    baseline: Mapping[str, float] | None = None,
    reference_lang: str = "en",
    *,
    method: Method = "rigorous",
) -> DisparityResult:
    """What quantizing in place did to each language, against the weights that `simulate_int4` remembered.

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
        return _legacy_disparity(model, tokenizer, _legacy_texts(texts), baseline, reference_lang)
    chosen = _text_set(texts, reference_lang)
    measurement = _measure_simulated(model, tokenizer, chosen, reference_lang)
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


def quantize_except(model: PreTrainedModel, protect: Collection[int]) -> None:
    """Quantize every layer but the given ones, in place: `simulate_int4` under the seeds' other name."""
    simulate_int4(model, exclude=check_layers(list(protect), _layers(model)) if protect else None)


def fair_quantize(model: PreTrainedModel, disparity_target: float = 0.7) -> tuple[int, ...]:
    """The seeds' rule for any depth, in place: protect the first and last layer, for a low target also one at 75 %.

    This is a rule of thumb that was never shown to beat other layers; `FairQuantizer` measures instead.

    Args:
        model: quantized in place by `quantize_except`.
        disparity_target: below 0.7 the layer at 75 % depth is protected, too.

    Returns:
        The protected layers, ascending.
    """
    layers = _layers(model)
    protect = gateway_layers(layers, disparity_target)
    quantize_except(model, protect)
    return protect


def _legacy_sweep(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], reference: str
) -> tuple[LegacySweepRow, ...]:
    before = perplexities(model, tokenizer, texts)
    rows = []
    for layer in range(_layers(model)):
        try:
            simulate_int4(model, protect_layers={layer})
            after = perplexities(model, tokenizer, texts)
        finally:
            if is_simulated(model):
                undo_simulation(model)
        change = {language: percent_change(before[language], after[language]) for language in texts}
        rows.append(LegacySweepRow(layer, disparity("D1", change, groups=Groups(reference=reference)), change))
    return tuple(sorted(rows, key=lambda row: (isinstance(row.disparity, Undefined), row.disparity)))


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
    loaded = from_loaded(model, tokenizer)
    return measure_states(
        ModelState(BASELINE, lambda: original_weights(model)),
        [fixed_state(SIMULATED, model)],
        tokenizer,
        texts.part("confirm"),
        part="confirm",
        provenance=lambda given: provenance(loaded.files, texts, seed=0, arguments=given),
        bootstrap=Bootstrap(reference),
    ).measurements[SIMULATED]


def _in_float32(loaded: LoadedModel) -> LoadedModel:
    """The same model in float32: 16-bit arithmetic is slow on a CPU, and its rounding would be measured, too."""
    if loaded.model.dtype == torch.float32:
        return loaded
    return replace(loaded, model=copy.deepcopy(loaded.model).to(torch.float32))  # type: ignore[arg-type]


def _text_set(texts: Mapping[str, str] | TextSet | None, reference: str) -> TextSet:
    if texts is None:
        return load_texts("bundled", languages=SEED_LANGUAGES, reference=reference)
    if not isinstance(texts, TextSet):
        raise ConfigError(
            'one text per language is too little to measure: give a TextSet (load_texts), or method="legacy"'
        )
    return texts


def _legacy_texts(texts: Mapping[str, str] | TextSet | None) -> Mapping[str, str]:
    if isinstance(texts, TextSet):
        raise ConfigError('method="legacy" takes one text per language, such as {"en": "...", "he": "..."}')
    return {language: DEFAULT_TEXTS[language] for language in SEED_LANGUAGES} if texts is None else texts


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.num_hidden_layers)
