"""Scores of layers that need no sweep: statistics of their weights, and what the gradients predict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, TextSet, Undefined, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence.weight_statistics import criticality, layer_statistics
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.measure.rows import Batch, pad_rows, tokenize_for
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank
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
    """Return `gradient` and `fisher`: the predicted rise of the loss (nats per byte) if this layer alone is quantized.

    First order: |Σ gradient · change| over all text of a language. Second order: ½ Σ gradient² · change², the diagonal
    of the empirical Fisher information from single sentences. Each is that of the language with the highest.

    Needs the memory of the model's linear weights once more, for gradients.

    Args:
        loaded: the model; unchanged afterwards, gradients included.
        texts: the sentences; the languages that count.
        units: the model's units.
        bank: what a layer would be quantized to.
        precision: at which precision.
        sentences: how many of each language.
    """
    changes = _changes(loaded, units, bank, precision)
    first: dict[str, dict[str, float]] = {layer: defaultdict(float) for layer in changes}
    second: dict[str, dict[str, float]] = {layer: defaultdict(float) for layer in changes}
    tokenized = tokenize_for(loaded.model, loaded.tokenizer, _spread(texts, sentences), context=CONTEXT)
    bytes_ = {language: sum(text.bytes_ for text in encoded) for language, encoded in tokenized.encoded.items()}
    with _requiring_gradients(loaded, [name for layer in changes.values() for name in layer]):
        for row in tokenized.rows:
            gradients = _gradients(loaded, pad_rows([row]), changes)
            for layer, by_name in changes.items():
                share = 1 / bytes_[row.language]
                pairs = [(gradients[name], change) for name, change in by_name.items()]
                first[layer][row.language] += share * sum(float((g * change).sum()) for g, change in pairs)
                second[layer][row.language] += share * sum(second_order(g.square(), change) for g, change in pairs)
    slopes = {layer: {tag: abs(value) for tag, value in totals.items()} for layer, totals in first.items()}
    return {
        "gradient": tuple(sensitivity_scores(slopes).values()),
        "fisher": tuple(sensitivity_scores(second).values()),
    }


def _changes(loaded: LoadedModel, units: UnitMap, bank: Bank, precision: Precision) -> dict[str, dict[str, Tensor]]:
    """Layer → parameter → quantized minus 16 bit."""
    return {
        str(layer): {
            name: value - loaded.model.get_parameter(name).detach()
            for group in units.groups_of(layer.layer)
            for name, value in bank.weights(str(layer.part(group)), precision).items()
        }
        for layer in map(Unit, range(units.layers))
    }


def _gradients(loaded: LoadedModel, batch: Batch, changes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of the summed loss of one row, by parameter."""
    names = [name for by_name in changes.values() for name in by_name]
    device = loaded.model.device
    logits = loaded.model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False).logits
    scored = logits.flatten(0, 1)[batch.positions.to(device)].float()
    loss = torch.nn.functional.cross_entropy(scored, batch.targets.to(device), reduction="sum")
    gradients = torch.autograd.grad(loss, [loaded.model.get_parameter(name) for name in names])
    return dict(zip(names, gradients, strict=True))


def _spread(texts: TextSet, count: int) -> TextSet:
    """So many of the sentences, evenly spread over the set."""
    some = min(count, len(texts))
    return texts.take([i * len(texts) // some for i in range(some)])


@contextmanager
def _requiring_gradients(loaded: LoadedModel, names: Sequence[str]) -> Iterator[None]:
    """Let these parameters take gradients inside a `with` block."""
    parameters = [loaded.model.get_parameter(name) for name in names]
    before = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, had in zip(parameters, before, strict=True):
            parameter.requires_grad_(had)


def first_order(gradient: Tensor, change: Tensor) -> float:
    """Return |Σ gradient · change|: what quantizing a weight should do to the loss, to first order.

    Args:
        gradient: of the loss, `[rows, cols]`, summed over text.
        change: quantized minus 16-bit weight, of the same shape.
    """
    return abs(float((gradient.double() * change.double()).sum()))


def second_order(squared_gradient: Tensor, change: Tensor) -> float:
    """Return ½ · Σ fisher · change²: the same to second order, with the diagonal of the empirical Fisher information.

    Args:
        squared_gradient: squares of the gradients of single sentences, averaged, `[rows, cols]`.
        change: quantized minus 16-bit weight, of the same shape.
    """
    return 0.5 * float((squared_gradient.double() * change.double().square()).sum())


def sensitivity_scores(by_unit: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return one score per unit from figures per language (`first_order`, `second_order`): that of the worst language.

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
