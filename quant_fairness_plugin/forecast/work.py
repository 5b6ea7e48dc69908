"""Arithmetic of a sweep, from its walks, its text and the model's shapes; and the time it takes at a measured speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quant_fairness_plugin.forecast.memory import fitting_weights
from quant_fairness_plugin.forecast.passes import Range, Text
from quant_fairness_plugin.forecast.speed import Speed
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.plans.tree import StateTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all walks of a sweep come to."""

    batch_passes: tuple[int, ...]
    """Block passes of one batch: of the walk that finds the supported languages, then of each walk of plans."""
    block_passes: int
    """Of all batches."""
    block_tokens: int
    """Tokens through a block, padding included: one for every token, block and state."""
    head_tokens: int
    """Tokens that the head scores: one for every token and state."""
    rounded_weights: int
    flops: int
    """Multiplications and additions of the blocks and the head."""

    def seconds(self, speed: Speed) -> Range:
        """The time that this takes."""
        blocks, head = speed.block.times(self.block_tokens), speed.head.times(self.head_tokens)
        return blocks + head + speed.rounding.times(self.rounded_weights)


def count_work(
    outline: Outline, groups: Sequence[str], trees: Sequence[StateTree], text: Text, *, precisions: int = 1
) -> Work:
    """Count what the walks come to.

    Args:
        outline: the model's shapes.
        groups: the fusion groups that are quantized.
        trees: the walks, each over all batches.
        text: the sentences.
        precisions: how many precisions but 16 bit there are.
    """
    passes = tuple(tree.block_passes for tree in trees)
    # The 16-bit model is scored once more, as what the states are compared with.
    scored = text.scored * sum(len(tree.stages[-1]) + 1 for tree in trees)
    tokens = text.padded * sum(passes)
    names = [name for layer in range(outline.layers) for name in outline.family.full_names(layer)]
    linear = 2 * sum(math.prod(outline.matrix(name)) for name in names) // outline.layers  # a block's, on average
    attention = 4 * _attention_width(outline) * text.attended * sum(passes)
    return Work(
        batch_passes=passes,
        block_passes=len(text.batches) * sum(passes),
        block_tokens=tokens,
        head_tokens=scored,
        rounded_weights=precisions * fitting_weights(outline, groups),
        flops=tokens * linear + attention + scored * 2 * outline.vocabulary * outline.width,
    )


def _attention_width(outline: Outline) -> int:
    """Channels of all heads: what the module after attention reads, where it is known which that is."""
    after = [
        f"{outline.family.blocks}.{layer}.{unit.modules[0]}"
        for layer in range(outline.layers)
        for unit in outline.family.units_of(layer)
        if unit.name == "o"
    ]
    return max(outline.matrix(name)[1] for name in after) if after else outline.width
