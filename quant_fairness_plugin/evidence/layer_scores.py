"""Scores of layers that need no sweep: statistics of their weights, and what the gradients predict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from quant_fairness_plugin.artifacts import Precision, TextSet, Undefined, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence.weight_statistics import criticality, layer_statistics
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.measure.rows import tokenize_for
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.backward import slopes_of
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.fisher import Changes, score_sentences, spread
from quant_fairness_plugin.sweep.memory import CONTEXT

SENTENCES = 16
"""Of each language, evenly spread: enough for an average over weights, and a backward pass each."""


def score_layers(
    loaded: LoadedModel, texts: TextSet, *, units: UnitMap, bank: Bank, quantized: Precision
) -> dict[str, tuple[float, ...]]:
    """Return scores that need no sweep, one per layer, high = protect first: of weights, gradients, and the seeds'.

    Args:
        loaded: the model; unchanged afterwards.
        texts: sentences for the gradients.
        units: the model's units.
        bank: what a layer would be quantized to.
        quantized: at which precision.
    """
    statistics = [
        layer_statistics(linear_weight(module) for module in loaded.linears(layer).values())
        for layer in range(loaded.layers)
    ]
    scores = {
        "variance": tuple(layer.variance for layer in statistics),
        "kurtosis": tuple(layer.kurtosis for layer in statistics),
        "magnitude": tuple(layer.magnitude for layer in statistics),
    }
    hand_made = criticality(statistics)
    if not isinstance(hand_made, Undefined):
        scores["criticality"] = hand_made
    return scores | gradient_scores(loaded, texts, units=units, bank=bank, precision=quantized)


def gradient_scores(
    loaded: LoadedModel,
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    precision: Precision,
    sentences: int = SENTENCES,
) -> dict[str, tuple[float, ...]]:
    """Return `gradient` and `fisher`: what quantizing this layer alone is predicted to do (nats per byte).

    First order: the change of the loss, |Σ gradient · change| over all text of a language. Second order: the KL to the
    16-bit model, added up over the layer's units as `sweep.fisher` scores them. Each is that of the worst language.

    Args:
        loaded: the model; unchanged afterwards, gradients included.
        texts: the sentences; the languages that count.
        units: the model's units.
        bank: what a layer would be quantized to.
        precision: at which precision.
        sentences: how many of each language.
    """
    some = spread(texts, sentences)
    changes = Changes.of(loaded, units, bank, [precision])
    first = _slopes_of_the_loss(loaded, some, changes)
    second, bytes_ = score_sentences(loaded, some, changes)
    rows: dict[str, dict[str, dict[str, float]]] = {"gradient": {}, "fisher": {}}
    for layer in map(Unit, range(units.layers)):
        inside = [unit for unit in units.group_names() if Unit.parse(unit).whole == layer]
        for name, nats in (
            ("gradient", {tag: abs(sum(first.get((u, tag), 0.0) for u in inside)) for tag in bytes_}),
            ("fisher", {tag: sum(sum(second[u][precision][tag]) for u in inside if u in second) for tag in bytes_}),
        ):
            rows[name][str(layer)] = {tag: value / sum(bytes_[tag]) for tag, value in nats.items()}
    return {name: tuple(sensitivity_scores(by_layer).values()) for name, by_layer in rows.items()}


def _slopes_of_the_loss(loaded: LoadedModel, texts: TextSet, changes: Changes) -> dict[tuple[str, str], float]:
    """Unit and language → Σ gradient · change, in nats."""
    tokenized = tokenize_for(loaded.model, loaded.tokenizer, texts, context=CONTEXT)
    totals: dict[tuple[str, str], float] = defaultdict(float)
    for row, (slopes,) in slopes_of(loaded, tokenized, changes, lambda _, batch: [batch.targets]):
        for (unit, _), slope in slopes.items():
            totals[unit, row.language] -= slope
    return totals


def sensitivity_scores(by_unit: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return one score per unit from figures per language: that of the worst language.

    Args:
        by_unit: unit → language → figure per byte or token of that language, so that languages can be compared.

    Raises:
        ConfigError: units with different languages, or with none.
    """
    languages = {frozenset(figures) for figures in by_unit.values()}
    if len(languages) != 1 or not next(iter(languages)):
        raise ConfigError("sensitivities of units in different languages, or in none: give every unit the same ones")
    worst = OBJECTIVES["worst"]
    return {unit: worst.of_figures(list(figures.values())) for unit, figures in by_unit.items()}
