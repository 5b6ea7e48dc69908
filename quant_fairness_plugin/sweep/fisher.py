"""What the rounding error of every unit does to every language, from one pass of gradients instead of a sweep.

For a small change ΔW of the weights, KL(p16 ‖ p) is ½ E[(g · ΔW)²] with the gradient g of the log-probability of labels
drawn from p16: the Fisher information along ΔW. `backward` gives the slopes g · ΔW, block by block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, TextSet, Unit
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.measure.rows import Batch, tokenize_for
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.backward import Errors, Key, Progress, is_transposed, slopes_of
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.memory import CONTEXT
from quant_fairness_plugin.sweep.sampling import DRAWS, spread_places

SentenceScores = dict[str, dict[Precision, dict[str, tuple[float, ...]]]]
"""Unit → precision → language → nats of each sentence."""


def spread(texts: TextSet, count: int) -> TextSet:
    """Return so many of the sentences, evenly spread over the set."""
    return texts.take(spread_places(len(texts), count))


def score_sentences(
    loaded: LoadedModel,
    texts: TextSet,
    changes: Changes,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[SentenceScores, dict[str, tuple[int, ...]]]:
    """Return the KL that each rounding error alone causes in each sentence, in nats, and the sentences' bytes.

    Args:
        loaded: the model; unchanged afterwards.
        texts: the sentences, see `spread`.
        changes: the rounding errors.
        draws: labels of each token.
        seed: of the labels.
        progress: called with (steps done, in all).

    Raises:
        QuantFairnessError: as `slopes_of`.
    """
    tokenized = tokenize_for(loaded.model, loaded.tokenizer, texts, context=CONTEXT)
    totals: dict[Key, dict[str, list[float]]] = defaultdict(
        lambda: {language: [0.0] * len(texts) for language in texts.languages}
    )
    generator = torch.Generator(loaded.model.device).manual_seed(seed)

    def sampled(log_probabilities: Tensor, batch: Batch) -> Iterator[Tensor]:
        probabilities = log_probabilities.exp()
        for _ in range(draws):
            yield torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    for row, slopes in slopes_of(loaded, tokenized, changes, sampled, progress=progress):
        for key in slopes[0]:
            totals[key][row.language][row.sentence] += sum(slope[key] ** 2 for slope in slopes) / (2 * draws)
    scores: SentenceScores = defaultdict(dict)
    for unit, precision in changes.keys:
        if (unit, precision) in totals:
            figures = totals[unit, precision]
            scores[unit][precision] = {tag: tuple(map(significant, values)) for tag, values in figures.items()}
    bytes_ = {tag: tuple(text.bytes_ for text in encoded) for tag, encoded in tokenized.encoded.items()}
    return dict(scores), bytes_


@dataclass(frozen=True, slots=True)
class Changes:
    """Rounding errors: quantized minus 16 bit, as the model stores it. Made layer by layer, when they are needed."""

    loaded: LoadedModel
    bank: Bank
    parameters: Mapping[str, tuple[str, ...]]
    """Unit → names of its weights."""
    precisions: tuple[Precision, ...]

    @classmethod
    def of(cls, loaded: LoadedModel, units: UnitMap, bank: Bank, precisions: Iterable[Precision]) -> Changes:
        """Return the errors of every unit at some precisions, with the weights of a bank."""
        return cls(loaded, bank, {name: units.parameters[name] for name in units.group_names()}, tuple(precisions))

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every unit at every precision, in forward order; some of them may have no errors."""
        return tuple((unit, precision) for unit in self.parameters for precision in self.precisions)

    def of_layer(self, layer: int) -> Errors:
        """Return a layer's errors, which take the memory of its weights once for every precision."""
        by_module: dict[str, dict[Key, Tensor]] = {}
        for unit in self.parameters:
            if Unit.parse(unit).layer != layer:
                continue
            for precision in self.precisions:
                for name, value in self.bank.weights(unit, precision).items():
                    change = value - self.loaded.model.get_parameter(name).detach()
                    by_module.setdefault(name, {})[unit, precision] = change
        return by_module


def check_linear(loaded: LoadedModel, units: UnitMap) -> None:
    """Refuse a model some of whose units hold weights that belong to no linear module, before any work.

    Raises:
        UnsupportedModelError: names the weight, and what to do instead.
    """
    for unit in units.group_names():
        for name in units.parameters[unit]:
            is_transposed(loaded, name)
