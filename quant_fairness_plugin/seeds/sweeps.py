"""`layer_sweep` and `quick_sweep`: which layers are most worth protecting, for a model that is in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import Bootstrap, Grid, Ranking, SweepReport, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import percent_change
from quant_fairness_plugin.model.load import from_loaded
from quant_fairness_plugin.seeds.computing import in_float32
from quant_fairness_plugin.seeds.disparity import Groups, disparity, perplexities
from quant_fairness_plugin.seeds.simulation import is_simulated, simulate_int4, undo_simulation
from quant_fairness_plugin.seeds.texts import Method, one_text_each, text_set
from quant_fairness_plugin.sweep.engine import sweep_units

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LegacySweepRow:
    """One layer of a legacy sweep: everything quantized but this layer."""

    layer: int
    disparity: float | Undefined
    """D1: mean over the other languages of their degradation over the reference's."""
    degradation: dict[str, float]
    """Percent change of perplexity by language."""


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
        grid: grid of the quantized layers, INT4 in groups of 128 by default; `legacy` has one scale per tensor.

    Raises:
        ConfigError: texts of the wrong kind, or a model that already carries a simulation.
    """
    if is_simulated(model):
        raise ConfigError("the model is already quantized by simulate_int4; take it back with undo_simulation first")
    if method == "legacy":
        return _legacy_sweep(model, tokenizer, one_text_each(texts), reference_lang)
    sentences = text_set(texts, reference_lang).part("search")
    return sweep_units(
        in_float32(from_loaded(model, tokenizer)), sentences, grid=grid, bootstrap=Bootstrap(reference_lang)
    )


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
    """Return the `top_n` layers most worth protecting, ascending. The model is left as it was.

    Takes the arguments of `layer_sweep`. By `rigorous` the layers are those whose protection leaves the worst-hit
    language best off, by `legacy` those with the lowest disparity: equal ones from the input on, those without one last
    and with a warning.

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
        for row in swept[:top_n]:
            if isinstance(row.disparity, Undefined):
                _logger.warning(
                    "layer %d is among the first %d without a disparity: %s", row.layer, top_n, row.disparity.undefined
                )
    return sorted(order[:top_n])


def _legacy_sweep(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], reference: str
) -> tuple[LegacySweepRow, ...]:
    before = perplexities(model, tokenizer, texts)
    rows = []
    for layer in range(model.config.num_hidden_layers):
        try:
            simulate_int4(model, protect_layers={layer})
            after = perplexities(model, tokenizer, texts)
        finally:
            if is_simulated(model):
                undo_simulation(model)
        change = {language: percent_change(before[language], after[language]) for language in texts}
        rows.append(LegacySweepRow(layer, disparity("D1", change, groups=Groups(reference=reference)), change))
    return tuple(sorted(rows, key=_place))


def _place(row: LegacySweepRow) -> tuple[float, int]:
    """Lowest disparity first; layers without one last; equal ones, which short texts give often, from the input on."""
    return (math.inf if isinstance(row.disparity, Undefined) else row.disparity, row.layer)
