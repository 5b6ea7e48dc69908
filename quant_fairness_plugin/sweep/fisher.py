"""What the rounding error of every unit does to every language, from one pass of gradients instead of a sweep.

For a small change ΔW of the weights, KL(p16 ‖ p) is ½ E[(g · ΔW)²] with the gradient g of the log-probability of labels
drawn from p16: the Fisher information along ΔW. No gradient of a weight is ever held: for a linear module g · ΔW is
Σ δ · (ΔW x) over its tokens, with its inputs x and the gradient δ at its outputs, so that a backward pass through the
activations serves all units and precisions at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Precision, TextSet
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.measure.rows import Batch, Row, TokenRows, pad_rows, tokenize_for
from quant_fairness_plugin.model.devices import wide_dtype
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.memory import CONTEXT

SENTENCES = 12
"""Of each language, evenly spread."""
DRAWS = 2
"""Labels of each token. With 12 sentences: 24 squared slopes a figure, each as variable as one of a normal variate."""
Key = tuple[str, Precision]
Slopes = Mapping[Key, float]
"""Unit and precision → g · ΔW, in nats."""
Labels = Callable[[Tensor, Batch], Iterable[Tensor]]
"""Log-probabilities `[targets, vocabulary]` and the batch → labels `[targets]`, any number of times."""
SentenceScores = dict[str, dict[Precision, dict[str, tuple[float, ...]]]]
"""Unit → precision → language → nats of each sentence."""


def spread(texts: TextSet, count: int) -> TextSet:
    """Return so many of the sentences, evenly spread over the set."""
    some = min(count, len(texts))
    return texts.take([i * len(texts) // some for i in range(some)])


def score_sentences(
    loaded: LoadedModel,
    texts: TextSet,
    changes: Changes,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SentenceScores, dict[str, tuple[int, ...]]]:
    """Return the KL that each rounding error alone causes in each sentence, in nats, and the sentences' bytes.

    Args:
        loaded: the model; unchanged afterwards.
        texts: the sentences, see `spread`.
        changes: the rounding errors.
        draws: labels of each token.
        seed: of the labels.
        progress: called with (sentences done, in all).

    Raises:
        UnsupportedModelError: a unit holds a weight that belongs to no linear module.
    """
    tokenized = tokenize_for(loaded.model, loaded.tokenizer, texts, context=CONTEXT)
    totals: dict[Key, dict[str, list[float]]] = {
        key: {language: [0.0] * len(texts) for language in texts.languages} for key in changes.keys
    }
    generator = torch.Generator(loaded.model.device).manual_seed(seed)

    def sampled(log_probabilities: Tensor, batch: Batch) -> Iterator[Tensor]:
        probabilities = log_probabilities.detach().exp()
        for _ in range(draws):
            yield torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    for number, (row, slopes) in enumerate(slopes_of(loaded, tokenized, changes, sampled)):
        for key, by_language in totals.items():
            by_language[row.language][row.sentence] += sum(slope[key] ** 2 for slope in slopes) / (2 * draws)
        if progress is not None:
            progress(number + 1, len(tokenized.rows))
    scores: SentenceScores = defaultdict(dict)
    for (unit, precision), figures in totals.items():
        scores[unit][precision] = {tag: tuple(map(significant, values)) for tag, values in figures.items()}
    bytes_ = {tag: tuple(text.bytes_ for text in encoded) for tag, encoded in tokenized.encoded.items()}
    return dict(scores), bytes_


@dataclass(frozen=True, slots=True)
class Changes:
    """Rounding errors: parameter → unit and precision → quantized minus 16 bit, as the model stores it."""

    by_parameter: Mapping[str, Mapping[Key, Tensor]]

    @classmethod
    def of(cls, loaded: LoadedModel, units: UnitMap, banks: Mapping[Precision, Bank], names: Iterable[str]) -> Changes:
        """Return the errors of some units, each precision with the weights of its bank.

        Takes the memory of these units' weights once for every precision.
        """
        found: dict[str, dict[Key, Tensor]] = {}
        for unit in names:
            for precision, bank in banks.items():
                for name, value in bank.weights(unit, precision).items():
                    change = value - loaded.model.get_parameter(name).detach()
                    found.setdefault(name, {})[unit, precision] = change
        return cls(found)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every unit and precision, in the order of the parameters."""
        return tuple(dict.fromkeys(key for errors in self.by_parameter.values() for key in errors))


def check_linear(loaded: LoadedModel, units: UnitMap) -> None:
    """Refuse a model some of whose units hold weights that belong to no linear module, before any work.

    Raises:
        UnsupportedModelError: names the weight, and what to do instead.
    """
    for unit in units.group_names():
        for name in units.parameters[unit]:
            _is_transposed(loaded, name)


def slopes_of(
    loaded: LoadedModel, tokenized: TokenRows, changes: Changes, labels: Labels
) -> Iterator[tuple[Row, list[Slopes]]]:
    """Yield every row with the slopes of its summed log-probability along the changes, once for each of its labels.

    Args:
        loaded: the model; unchanged.
        tokenized: the rows.
        changes: the directions.
        labels: whose log-probability.
    """
    with _Watch.over(loaded, changes) as watch:
        for row in tokenized.rows:
            batch = pad_rows([row])
            with torch.enable_grad():
                start = watch.forward(loaded, batch)
                given = list(labels(watch.log_probabilities, batch))
                slopes = [watch.backward(start, each, more=i + 1 < len(given)) for i, each in enumerate(given)]
            watch.forget()
            yield row, slopes


@dataclass(slots=True)
class _Watch:
    """Hooks on the linear modules of a model that add up the slopes of the row that is running."""

    keys: tuple[Key, ...]
    log_probabilities: Tensor = field(default_factory=lambda: torch.empty(0))
    embedded: Tensor | None = None
    slopes: dict[Key, float] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def over(cls, loaded: LoadedModel, changes: Changes) -> Iterator[_Watch]:
        """Watch a model inside a `with` block."""
        watch = cls(changes.keys)
        with ExitStack() as stack:
            embedding = loaded.model.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(watch._start).remove)
            for name, errors in changes.by_parameter.items():
                hook = watch._hook(_is_transposed(loaded, name), errors)
                module = loaded.model.get_submodule(name.removesuffix(".weight"))
                stack.callback(module.register_forward_hook(hook).remove)
            yield watch

    def forward(self, loaded: LoadedModel, batch: Batch) -> Tensor:
        """Run a row, keep its log-probabilities, and return what the backward passes end at."""
        device = loaded.model.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
        self.log_probabilities = torch.log_softmax(logits[batch.positions.to(device)].float(), dim=-1)
        assert self.embedded is not None
        return self.embedded

    def backward(self, start: Tensor, labels: Tensor, *, more: bool) -> Slopes:
        """Return the slopes for one choice of labels."""
        self.slopes = dict.fromkeys(self.keys, 0.0)
        total = self.log_probabilities.gather(1, labels[:, None].to(start.device)).sum()
        torch.autograd.grad(total, start, retain_graph=more)
        return self.slopes

    def forget(self) -> None:
        """Free the row's graph."""
        self.log_probabilities, self.embedded = torch.empty(0), None

    def _start(self, module: nn.Module, given: Any, output: Tensor) -> Tensor:
        """Let gradients flow from the embedded tokens on, so that no weight takes any."""
        self.embedded = output.detach().requires_grad_(True)
        return self.embedded

    def _hook(self, transposed: bool, errors: Mapping[Key, Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.no_grad():
                moved = {
                    key: given[0] @ error if transposed else nn.functional.linear(given[0], error)
                    for key, error in errors.items()
                }

            def add(gradient: Tensor) -> None:
                for key, change in moved.items():
                    self.slopes[key] += float((gradient * change).sum(dtype=wide_dtype(gradient.device)))

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook


def _is_transposed(loaded: LoadedModel, parameter: str) -> bool:
    """Return whether the linear module of a weight stores it as `[in_features, out_features]`.

    Raises:
        UnsupportedModelError: it belongs to no linear module.
    """
    module = loaded.model.get_submodule(parameter.rpartition(".")[0])
    if not parameter.endswith(".weight") or not (isinstance(module, nn.Linear) or is_conv1d(module)):
        raise UnsupportedModelError(
            f"{parameter} is no weight of a linear module, so its rounding error cannot be scored by gradients; linear "
            "modules are accepted. Use --exhaustive."
        )
    return is_conv1d(module)
