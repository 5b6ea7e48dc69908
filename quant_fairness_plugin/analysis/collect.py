"""One pass with hooks over the 16-bit model and a quantized one: sums of what passes through every block, by sentence.

Streamed: of a batch, the 16-bit model's hidden states of all layers are held until the quantized model has been run.
Text tokens count; BOS, which stands before the text of every language, does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.measure.rows import Batch, tokenize_for
from quant_fairness_plugin.measure.scoring import ModelState
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.sweep.memory import CONTEXT

BATCH_TOKENS = 1024
POWERS = 4


@dataclass(slots=True)
class Activations:
    """Sums over the text tokens of one language. Hidden states are a block's output, unless it says otherwise."""

    tokens: Array
    """`[sentences]`."""
    cosine_distance: Array
    """1 - cosine of the quantized and the 16-bit hidden state, `[layers, sentences]`."""
    squared_error: Array
    """Of the quantized hidden state, `[layers, sentences]`."""
    squared_norm: Array
    """Of the 16-bit hidden state, `[layers, sentences]`."""
    added: Array
    """Mean over the channels of |output - input|, what a block adds, `[layers, sentences]`."""
    channels: Array
    """Squares of the 16-bit hidden state by channel, `[layers, width]`."""
    powers: Array
    """First to fourth powers of the values of a block's input, `[layers, 4]`."""
    samples: list[list[Array]] = field(default_factory=list)
    """Values of every block's input, evenly spread over each batch; empty where none were asked for."""

    @classmethod
    def empty(cls, layers: int, sentences: int, width: int) -> Activations:
        """Return sums over no token."""
        first, second, third, fourth = np.zeros((4, layers, sentences))
        channels, powers = np.zeros((layers, width)), np.zeros((layers, POWERS))
        return cls(np.zeros(sentences), first, second, third, fourth, channels, powers, [[] for _ in range(layers)])

    @property
    def values(self) -> float:
        """How many values of each layer's input the powers are sums of."""
        return float(self.tokens.sum() * self.channels.shape[1])

    def sample(self, layer: int) -> Array:
        """Return the values of a block's input that were kept."""
        return np.concatenate(self.samples[layer])


def collect(
    loaded: LoadedModel,
    quantized: ModelState,
    texts: TextSet,
    *,
    sample: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Activations]:
    """Run both models once on every sentence.

    Args:
        loaded: the 16-bit model.
        quantized: the model to compare, with blocks under the same names; may be `loaded` with other weights.
        texts: the sentences.
        sample: how many values of each block's input to keep by batch and language.
        progress: called with (batches done, in all).

    Returns:
        Language → its sums.

    Raises:
        UnsupportedModelError: as `tokenize_for`.
        ArtifactError: a token without an embedding.
    """
    tokenized = tokenize_for(loaded.model, loaded.tokenizer, texts, context=CONTEXT)
    batches = tokenized.batches(BATCH_TOKENS)
    width = int(loaded.model.config.get_text_config().hidden_size)
    activations = {name: Activations.empty(loaded.layers, len(texts), width) for name in texts.languages}
    for number, batch in enumerate(batches):
        notes = _Notes(activations, _text_tokens(batch), sample)
        _run(loaded.model, loaded.family.blocks, batch, notes.take_16_bit)
        with quantized.applied() as model:
            _run(model, loaded.family.blocks, batch, notes.compare)
        notes.count()
        if progress is not None:
            progress(number + 1, len(batches))
    return activations


def spread(values: Array, count: int, width: int) -> Array:
    """Return at most so many values, evenly spread, of rows that are `width` long: from all columns alike."""
    step = max(1, len(values) // count)
    while math.gcd(step, width) > 1:  # or it would come back to the same columns in every row
        step += 1
    return values[::step][:count]


Rows = list[tuple[int, int, int, int]]
"""Row of the batch, its sentence, and the tokens that count: from one up to another."""
Note = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Notes:
    """What is taken down of one batch, block by block."""

    activations: dict[str, Activations]
    counted: dict[str, Rows]
    sample: int
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Layer → hidden states of the 16-bit model."""

    def take_16_bit(self, layer: int, entered: Tensor, left: Tensor) -> None:
        self.kept[layer] = left.double()
        for language, rows in self.counted.items():
            _add_16_bit(self.activations[language], layer, rows, entered.double(), self.kept[layer], self.sample)

    def compare(self, layer: int, _: Tensor, left: Tensor) -> None:
        for language, rows in self.counted.items():
            _add_difference(self.activations[language], layer, rows, self.kept[layer], left.double())

    def count(self) -> None:
        for language, rows in self.counted.items():
            for _, sentence, first, last in rows:
                self.activations[language].tokens[sentence] += last - first


def _text_tokens(batch: Batch) -> dict[str, Rows]:
    counted: dict[str, Rows] = {}
    for index, row in enumerate(batch.rows):
        counted.setdefault(row.language, []).append((index, row.sentence, row.first, len(row.ids)))
    return counted


@torch.no_grad()
def _run(model: PreTrainedModel, blocks: str, batch: Batch, note: Note) -> None:
    with hooked(model.get_submodule(blocks), note):
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def hooked(blocks: nn.Module, note: Note) -> Iterator[None]:
    """Call `note(layer, input, output)` after every block for the time of a `with` block."""

    def hook(layer: int) -> Callable[..., None]:
        def after(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            entered = positional[0] if positional else named["hidden_states"]
            note(layer, entered, output[0] if isinstance(output, tuple) else output)

        return after

    handles = [
        block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(blocks.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_16_bit(activations: Activations, layer: int, rows: Rows, entered: Tensor, left: Tensor, sample: int) -> None:
    for row, sentence, first, last in rows:
        before, after = entered[row, first:last], left[row, first:last]
        activations.squared_norm[layer, sentence] += float(after.square().sum())
        activations.added[layer, sentence] += float((after - before).abs().mean(dim=1).sum())
        activations.channels[layer] += after.square().sum(dim=0).cpu().numpy()
        activations.powers[layer] += [float(before.pow(power).sum()) for power in range(1, POWERS + 1)]
    if sample:
        values = torch.cat([entered[row, first:last].flatten() for row, _, first, last in rows]).cpu().numpy()
        activations.samples[layer].append(spread(values, sample, entered.shape[-1]))


def _add_difference(activations: Activations, layer: int, rows: Rows, left: Tensor, other: Tensor) -> None:
    for row, sentence, first, last in rows:
        one, two = left[row, first:last], other[row, first:last]
        activations.squared_error[layer, sentence] += float((one - two).square().sum())
        # Half the squared distance of the directions is 1 - cosine, and exactly 0 for equal vectors.
        directions = nn.functional.normalize(one, dim=1) - nn.functional.normalize(two, dim=1)
        activations.cosine_distance[layer, sentence] += float(directions.square().sum()) / 2
