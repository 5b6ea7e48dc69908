"""Runs a state tree on one batch of text: every node once, nodes of equal weights together. Step 4 (sweep).

Takes the model, a `StateTree` and token ids; returns what the head would be given in every state. The model's own
parameters are exchanged by reference and always put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import BlockCall, head_input, rehearse
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.limits import STACK_TOKENS
from quant_fairness_plugin.sweep.tree import StateTree, Variant
from quant_fairness_plugin.sweep.units import HEAD


@dataclass(slots=True)
class Walk:
    """One batch on its way through the tree."""

    loaded: LoadedModel
    tree: StateTree
    bank: Bank
    ids: Tensor
    mask: Tensor
    calls: tuple[tuple[BlockCall, BlockCall], ...]
    """Per layer what the block is called with for the batch once, and for the batch twice."""
    hidden: list[Tensor]
    """Per node of the stage that was run last, `[rows, tokens, width]`."""
    passes: int = 0
    """Block passes so far, each on one state."""

    def step(self, layer: int) -> None:
        """Run a block for all its nodes."""
        stage = self.tree.stages[layer + 1]
        block = self.loaded.block(layer)
        following: list[Tensor | None] = [None] * len(stage)
        for variant, nodes in self.tree.by_variant(layer + 1).items():
            with exchanged(self.loaded, self.bank, variant):
                for piece in self._pieces(nodes):
                    stacked = torch.cat([self.hidden[stage[node].parent] for node in piece])
                    output = repeated(*self.calls[layer], len(piece)).run(block, stacked)
                    for node, part in zip(piece, torch.split(output, len(self.ids)), strict=True):
                        following[node] = part
            self.passes += len(nodes)
        self.hidden = [found for found in following if found is not None]

    def head_inputs(self) -> Iterator[tuple[int, Variant, Tensor]]:
        """Leaf, what its head is quantized to, and what the head is given, `[rows, tokens, width]`."""
        last = len(self.tree.stages) - 1
        for variant, nodes in self.tree.by_variant(last).items():
            head = tuple(pair for pair in variant if pair[0] == HEAD)
            with exchanged(self.loaded, self.bank, tuple(pair for pair in variant if pair not in head)):
                for piece in self._pieces(nodes):
                    stacked = torch.cat([self.hidden[self.tree.stages[last][node].parent] for node in piece])
                    ids, mask = self.ids.repeat(len(piece), 1), self.mask.repeat(len(piece), 1)
                    given = head_input(self.loaded, ids, mask, stacked)
                    for node, part in zip(piece, torch.split(given, len(self.ids)), strict=True):
                        yield node, head, part

    def _pieces(self, nodes: Sequence[int]) -> Iterator[Sequence[int]]:
        size = max(1, STACK_TOKENS[self.ids.device.type] // self.ids.numel())
        return (nodes[start : start + size] for start in range(0, len(nodes), size))


@torch.no_grad()
def enter(loaded: LoadedModel, tree: StateTree, bank: Bank, ids: Tensor, mask: Tensor) -> Walk:
    """Bring a batch to the first block, in every variant of what comes before it.

    Args:
        loaded: the model, in evaluation mode.
        tree: the states.
        bank: their weights.
        ids: token ids `[rows, tokens]`, padded on the right.
        mask: 1 where there is a token.
    """
    once = rehearse(loaded, ids, mask)
    twice = rehearse(loaded, ids.repeat(2, 1), mask.repeat(2, 1))
    hidden: list[Tensor] = []
    for node in tree.stages[0]:
        if not node.variant:
            hidden.append(once.hidden)
            continue
        with exchanged(loaded, bank, node.variant):
            hidden.append(rehearse(loaded, ids, mask).hidden)
    return Walk(loaded, tree, bank, ids, mask, tuple(zip(once.calls, twice.calls, strict=True)), hidden)


def repeated(once: BlockCall, twice: BlockCall, copies: int) -> BlockCall:
    """What a block is called with for `copies` copies of a batch, one after another.

    Which arguments have a batch dimension, and of what multiple (BLOOM's ALiBi has rows times heads), is read off the
    calls for one and for two copies: it is the first dimension of every tensor whose size doubles.
    """
    positional = tuple(_tile(a, b, copies) for a, b in zip(once.positional, twice.positional, strict=True))
    return BlockCall(positional, {name: _tile(value, twice.named[name], copies) for name, value in once.named.items()})


def _tile(once: Any, twice: Any, copies: int) -> Any:
    if isinstance(once, tuple):
        return tuple(_tile(a, b, copies) for a, b in zip(once, twice, strict=True))
    if not isinstance(once, Tensor) or once.shape == twice.shape or copies == 1:
        return once
    return once.repeat(copies, *[1] * (once.dim() - 1))


@contextmanager
def exchanged(loaded: LoadedModel, bank: Bank, variant: Variant) -> Iterator[None]:
    """The parameters of a variant in the model, for the time of a `with` block. Nothing is copied."""
    values = {name: value for unit, precision in variant for name, value in bank.weights(unit, precision).items()}
    parameters = {name: loaded.model.get_parameter(name) for name in values}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original
