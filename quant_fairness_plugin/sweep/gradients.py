"""Scores of layers from gradients, for controls: what Taylor's expansion says that quantizing a layer costs.

Step 4 (sweep). Takes the model, sentences and a bank; returns one figure per layer. Nothing is quantized: whether the
expansion predicts what a layer is worth is what a sweep measures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, TextSet
from quant_fairness_plugin.measure.rows import Batch, pad_rows, position_limit, tokenize
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.limits import CONTEXT
from quant_fairness_plugin.sweep.units import UnitMap
from quant_fairness_plugin.sweep.weight_statistics import second_order, sensitivity_scores

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
