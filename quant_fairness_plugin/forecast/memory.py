"""Memory that a sweep takes beside the libraries, from shapes alone: weights, hidden states, scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Unit
from quant_fairness_plugin.forecast.passes import Text
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.plans.tree import StateTree
from quant_fairness_plugin.sweep.memory import STACK_TOKENS, count_needs

FLOAT = 4
"""Bytes of a value: a sweep on a CPU computes in float32."""
RUNNING_SUMS = 40
"""Bytes of what is summed over the vocabulary for one token of one state: three float64, and best token and peak."""
ROUNDING_COPIES = 4
"""What rounding a matrix takes at its peak, in copies of it."""
LOGIT_COPIES = 3
"""Logits, their differences and their exponentials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that a sweep holds at the peak. Python, its libraries and freed memory that they keep come on top."""

    weights: int
    """The whole model in memory; streamed, one block in every precision and the next one."""
    rounded: int
    """Rounded weights that stay in memory."""
    states: int
    """Hidden states of all plans."""
    work: int
    """What a block, or the head with its scores, takes while it runs; whichever is more."""
    spilled: int = 0
    """Hidden states that go to disk instead."""

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.weights + self.rounded + self.states + self.work


def in_memory(
    outline: Outline, groups: Sequence[str], trees: Sequence[StateTree], text: Text, *, precisions: int
) -> Memory:
    """Return what a sweep with the whole model loaded takes, and every rounded weight in memory."""
    rows, width, scored = text.largest
    nodes = max(map(stacked_nodes, trees))
    leaves = max(len(tree.stages[-1]) for tree in trees)
    return Memory(
        weights=FLOAT * outline.parameters,
        rounded=FLOAT * precisions * fitting_weights(outline, groups),
        states=FLOAT * outline.width * rows * width * nodes,
        work=max(block_work(outline), head_work(outline, leaves, scored)),
    )


def streamed(
    outline: Outline, trees: Sequence[StateTree], text: Text, *, precisions: int, budget: int | None
) -> Memory:
    """Return what a sweep under a budget takes: one block in every precision, and all hidden states that fit.

    Args:
        outline: the model's shapes.
        trees: the walks.
        text: the sentences.
        precisions: how many precisions but 16 bit there are.
        budget: bytes for everything; hidden states beyond it are spilled. None is no limit.
    """
    rows, width, _ = text.largest
    needs = count_needs(outline.shapes, blocks=outline.family.blocks, precisions=precisions, tokens=rows * width)
    most = max(len(stage) for tree in trees for stage in tree.stages)
    # All batches after a layer, and of one of them those before it.
    states = FLOAT * outline.width * (text.padded + rows * width) * most
    room = states if budget is None else max(0, budget - needs.least)
    return Memory(
        weights=needs.blocks, rounded=0, states=min(states, room), work=needs.work, spilled=max(0, states - room)
    )


def stacked_nodes(tree: StateTree) -> int:
    """Hidden states that are held at once: those before a block and those after it, where that is most."""
    counts = [len(stage) for stage in tree.stages[:-1]]
    return max(before + after for before, after in zip(counts, counts[1:], strict=False))


def fitting_weights(outline: Outline, groups: Sequence[str]) -> int:
    """Weights that the grid quantizes, of all layers.

    Args:
        outline: the model's shapes.
        groups: from `fitting_groups`.
    """
    fitting, family = frozenset(groups), outline.family
    return sum(
        math.prod(outline.matrix(f"{family.blocks}.{layer}.{module}"))
        for layer in range(outline.layers)
        for unit in family.units_of(layer)
        if str(Unit(layer, unit.name)) in fitting
        for module in unit.modules
    )


def widest_layer(outline: Outline) -> tuple[str, ...]:
    """Return the full names of the linear modules of the layer whose matrices are largest together."""
    layers = map(outline.family.full_names, range(outline.layers))
    return max(layers, key=lambda names: sum(math.prod(outline.matrix(name)) for name in names))


def block_work(outline: Outline) -> int:
    """A block on a piece of the stack (its input, and the outputs of all its linear modules), or rounding a matrix."""
    names = widest_layer(outline)
    outputs = sum(outline.matrix(name)[0] for name in names)
    running = STACK_TOKENS.cpu * (2 * outline.width + outputs)
    largest = max(math.prod(outline.matrix(name)) for name in names)
    return FLOAT * max(running, ROUNDING_COPIES * largest)


def head_work(outline: Outline, leaves: int, scored: int) -> int:
    """The head's inputs of one batch (picked, stacked, and stacked with the 16-bit model's), sums, and logits."""
    from quant_fairness_plugin.measure.streamed import PIECE_ELEMENTS

    inputs = FLOAT * outline.width * scored * (leaves + leaves + leaves + 1)
    return inputs + RUNNING_SUMS * scored * (leaves + 1) + FLOAT * LOGIT_COPIES * PIECE_ELEMENTS.cpu
