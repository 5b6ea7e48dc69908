"""Layer scores that need no search: gradients, and statistics of the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import Batch, pad_rows, position_limit, tokenize
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.memory import CONTEXT


def layer_scores(
    loaded: LoadedModel, texts: TextSet, *, units: UnitMap, bank: Bank, quantized: Precision
) -> dict[str, tuple[float, ...]]:
    """Scores that need no sweep, one per layer, high = protect first: of the weights, gradients, and the seeds'."""
    statistics = [_statistics(loaded, layer) for layer in range(loaded.layers)]
    scores = {
        "variance": tuple(layer.variance for layer in statistics),
        "kurtosis": tuple(layer.kurtosis for layer in statistics),
        "magnitude": tuple(layer.magnitude for layer in statistics),
    }
    hand_made = criticality(statistics)
    if not isinstance(hand_made, Undefined):
        scores["criticality"] = hand_made
    return scores | gradient_scores(loaded, texts, units=units, bank=bank, precision=quantized)


def _statistics(loaded: LoadedModel, layer: int) -> LayerStatistics:
    return layer_statistics(linear_weight(module) for module in loaded.linears(layer).values())


SENTENCES = 16
"""Of each language, evenly spread: enough for an average over weights, and a backward pass each."""


def gradient_scores(
    loaded: LoadedModel,
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    precision: Precision,
    sentences: int = SENTENCES,
) -> dict[str, tuple[float, ...]]:
    """`gradient` and `fisher`: predicted rise of the loss in nats per byte where only this layer is quantized.

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
    bytes_ = {language: 0 for language in texts.languages}
    tokenized = tokenize(
        loaded.tokenizer, _spread(texts, sentences), context=min(CONTEXT, position_limit(loaded.model))
    )
    for language, encoded in tokenized.encoded.items():
        bytes_[language] = sum(text.bytes_ for text in encoded)
    with _learning(loaded, [name for layer in changes.values() for name in layer]):
        for row in tokenized.rows:
            gradients = _gradients(loaded, pad_rows([row]), changes)
            for layer, own in changes.items():
                share = 1 / bytes_[row.language]
                pairs = [(gradients[name], change) for name, change in own.items()]
                first[layer][row.language] += share * sum(float((g * change).sum()) for g, change in pairs)
                second[layer][row.language] += share * sum(second_order(g.square(), change) for g, change in pairs)
    slopes = {layer: {name: abs(value) for name, value in found.items()} for layer, found in first.items()}
    return {
        "gradient": tuple(sensitivity_scores(slopes).values()),
        "fisher": tuple(sensitivity_scores(second).values()),
    }


def _changes(loaded: LoadedModel, units: UnitMap, bank: Bank, precision: Precision) -> dict[str, dict[str, Tensor]]:
    """Layer → parameter → quantized minus 16 bit."""
    return {
        f"layers.{layer}": {
            name: value - loaded.model.get_parameter(name).detach()
            for group in units.groups
            for name, value in bank.weights(f"layers.{layer}.{group}", precision).items()
        }
        for layer in range(units.layers)
    }


def _gradients(loaded: LoadedModel, batch: Batch, changes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of the summed loss of one row, by parameter."""
    names = [name for own in changes.values() for name in own]
    device = loaded.model.device
    logits = loaded.model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False).logits
    scored = logits.flatten(0, 1)[batch.positions.to(device)].float()
    loss = torch.nn.functional.cross_entropy(scored, batch.targets.to(device), reduction="sum")
    found = torch.autograd.grad(loss, [loaded.model.get_parameter(name) for name in names])
    return dict(zip(names, found, strict=True))


def _spread(texts: TextSet, count: int) -> TextSet:
    """So many sentences, evenly spread over the set."""
    some = min(count, len(texts))
    return texts.take([i * len(texts) // some for i in range(some)])


@contextmanager
def _learning(loaded: LoadedModel, names: Sequence[str]) -> Iterator[None]:
    """These parameters take gradients for the time of a `with` block."""
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


OUTLIER_DEVIATIONS = 2.5
"""A weight counts as an outlier beyond so many standard deviations of its own matrix, as in the seeds' score."""


CHUNK = 1 << 22
"""Weights turned to float64 at a time: 32 MiB, whatever the size of the matrix."""


CONSOLIDATION = (0.7, 0.8)
"""Relative depths that the seeds' score favours."""


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Statistics of a layer's weight matrices, each matrix by itself, averaged by the number of weights."""

    variance: float
    kurtosis: float
    """Excess kurtosis: 0 for a normal distribution."""
    magnitude: float
    """Mean absolute weight."""
    outlier_share: float
    """Weights beyond 2.5 standard deviations of their matrix."""


def layer_statistics(weights: Iterable[Tensor]) -> LayerStatistics:
    """The statistics of one layer, exact (two passes in float64).

    Args:
        weights: the layer's weight matrices `[rows, cols]`, one at a time; norms and biases do not belong here.

    Raises:
        ConfigError: no matrix, a tensor that is none, or values that are not finite.
    """
    rows, counts = [], []
    for weight in weights:
        if weight.dim() != 2:
            raise ConfigError(f"a weight of shape {tuple(weight.shape)}: give matrices only, not norms or biases")
        rows.append(_moments(weight))
        counts.append(float(weight.numel()))
    if not rows:
        raise ConfigError("no weight matrix in the layer, so it has no statistics")
    values = torch.tensor(rows, dtype=torch.float64)
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return LayerStatistics(*(share @ values).tolist())


def criticality(layers: Sequence[LayerStatistics]) -> tuple[float, ...] | Undefined:
    """The seeds' criticality score of every layer, on real statistics; high = protect first.

    Its weights were chosen by hand, never fitted: 2.5 · first or last layer + 1.5 · variance + 0.8 · excess kurtosis +
    1.2 · outlier share (each over its mean over the layers) + 1.0 · depth between 70 and 80 % - 0.5 · distance to the
    nearer end over half the depth.

    Returns:
        One score per layer; undefined where a mean is not above 0, so that nothing can be relative to it.

    Raises:
        ConfigError: fewer than two layers.
    """
    n = len(layers)
    if n < 2:
        raise ConfigError(f"{n} layer(s): the score compares layers, give at least 2")
    columns = {
        "variance": [layer.variance for layer in layers],
        "excess kurtosis": [layer.kurtosis for layer in layers],
        "outlier share": [layer.outlier_share for layer in layers],
    }
    means = {name: sum(values) / n for name, values in columns.items()}
    for name, mean in means.items():
        if mean <= 0:
            return Undefined(f"the mean {name} of the layers is {mean:.3g}: the score divides by it")
    relative = zip(*([value / means[name] for value in values] for name, values in columns.items()), strict=True)
    return tuple(
        1.5 * variance + 0.8 * kurtosis + 1.2 * outliers + _place(layer, n)
        for layer, (variance, kurtosis, outliers) in enumerate(relative)
    )


def first_order(gradient: Tensor, change: Tensor) -> float:
    """|Σ gradient · change|: what quantizing a weight should do to the loss, to first order.

    Args:
        gradient: of the loss, `[rows, cols]`, summed over text.
        change: quantized minus 16-bit weight, of the same shape.
    """
    return abs(float((gradient.double() * change.double()).sum()))


def second_order(squared_gradient: Tensor, change: Tensor) -> float:
    """½ · Σ fisher · change²: the same to second order, with the diagonal of the empirical Fisher information.

    Args:
        squared_gradient: squares of the gradients of single sentences, averaged, `[rows, cols]`.
        change: quantized minus 16-bit weight, of the same shape.
    """
    return 0.5 * float((squared_gradient.double() * change.double().square()).sum())


def sensitivity_scores(by_unit: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One score per unit from figures per language (`first_order`, `second_order`): that of the worst language.

    Args:
        by_unit: unit → language → figure per byte or token of that language, so that languages can be compared.

    Raises:
        ConfigError: units with different languages, or with none.
    """
    languages = {frozenset(figures) for figures in by_unit.values()}
    if len(languages) != 1 or not next(iter(languages)):
        raise ConfigError("sensitivities of units in different languages, or in none: give every unit the same ones")
    return {unit: max(figures.values()) for unit, figures in by_unit.items()}


def _place(layer: int, layers: int) -> float:
    """What the score gives a layer for where it stands."""
    last = layers - 1
    low, high = CONSOLIDATION
    inside = low <= layer / last <= high
    return 2.5 * (layer in (0, last)) + 1.0 * inside - 0.5 * min(layer, last - layer) / (layers // 2)


def _moments(weight: Tensor) -> tuple[float, float, float, float]:
    """Variance, excess kurtosis, mean magnitude and outlier share of one matrix."""
    pieces = torch.split(weight.detach().reshape(-1), CHUNK)
    count = weight.numel()
    mean = sum(float(piece.double().sum()) for piece in pieces) / count
    magnitude = sum(float(piece.double().abs().sum()) for piece in pieces) / count
    second = fourth = 0.0
    for piece in pieces:
        squares = (piece.double() - mean).square()
        second += float(squares.sum()) / count
        fourth += float(squares.square().sum()) / count
    if not second < float("inf"):
        raise ConfigError(f"a weight of shape {tuple(weight.shape)} has variance {second}: it holds no finite spread")
    if second == 0.0:  # all weights are equal (a pruned matrix): no spread, so no tails either
        return 0.0, 0.0, magnitude, 0.0
    limit = OUTLIER_DEVIATIONS * second**0.5
    outliers = sum(int(((piece.double() - mean).abs() > limit).sum()) for piece in pieces)
    return second, fourth / second**2 - 3.0, magnitude, outliers / count
