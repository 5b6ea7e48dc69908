"""Run a state tree on a batch of text, stage by stage: nodes of equal weights together; and score its leaves.

What both loop orders share: `walk` has batches outside and layers inside, `streaming` has layers outside. Whoever calls
`TreeRunner` holds the hidden states between two stages. The model's parameters are exchanged by reference and always
put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.measure.rows import Array, Batch, sum_rows
from quant_fairness_plugin.measure.scoring import find_head
from quant_fairness_plugin.measure.streamed import Head, score_hidden
from quant_fairness_plugin.model.exchange import exchanged
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import BlockCall, check_independent, head_input, rehearse
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.model.tables import Table
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.plans.tree import StateTree, Variant
from quant_fairness_plugin.plans.units import HEAD
from quant_fairness_plugin.sweep.bank import Bank, variant_weights
from quant_fairness_plugin.sweep.memory import STACK_TOKENS

BatchScores = dict[str, Array]
"""State → NLL, KL and flips of each row of a batch, `[rows, 3]`."""
Calls = tuple[BlockCall, BlockCall]
"""What a block is called with for the batch once, and for the batch twice."""
Read = Callable[[int], Tensor]
"""Node of the stage before → its hidden states, `[rows, tokens, width]`."""
Write = Callable[[int, Tensor], None]
"""Takes a node of a stage with its hidden states."""


class Inputs(NamedTuple):
    """Token ids and attention mask of a batch on the model's device, `[rows, tokens]` each, padded on the right."""

    ids: Tensor
    mask: Tensor

    def copies(self, count: int) -> Inputs:
        """Return the batch `count` times, one after another."""
        return Inputs(self.ids.repeat(count, 1), self.mask.repeat(count, 1))


@dataclass(frozen=True, slots=True)
class TreeRunner:
    """Runs the nodes of a state tree, stage by stage."""

    loaded: LoadedModel
    """In evaluation mode; bit-identical after every call."""
    tree: StateTree
    bank: Bank
    head: Head
    """Of the 16-bit model."""

    @classmethod
    def of(cls, loaded: LoadedModel, tree: StateTree, bank: Bank) -> TreeRunner:
        """Make the runner of a model, with what its head does."""
        return cls(loaded, tree, bank, find_head(loaded))

    def inputs(self, batch: Batch) -> Inputs:
        """Return what the model is given for a batch."""
        device = self.loaded.model.device
        return Inputs(batch.ids.to(device), batch.mask.to(device))

    def calls(self, inputs: Inputs) -> tuple[Calls, ...]:
        """Return what every layer's block is called with."""
        once, twice = rehearse(self.loaded, *inputs), rehearse(self.loaded, *inputs.copies(2))
        return tuple(zip(once.calls, twice.calls, strict=True))

    def enter(self, inputs: Inputs, write: Write) -> None:
        """Bring a batch to the first block, in every variant of what comes before it."""
        for index, node in enumerate(self.tree.stages[0]):
            with self._weights_of(node.variant):
                write(index, rehearse(self.loaded, *inputs).hidden)

    def step(self, layer: int, inputs: Inputs, calls: Calls, read: Read, write: Write) -> None:
        """Run a block for all its nodes on a batch."""
        block, stage = self.loaded.block(layer), self.tree.stages[layer + 1]
        for variant, nodes in self.tree.by_variant(layer + 1).items():
            with self._weights_of(variant):
                for piece in _stacks(nodes, inputs):
                    stacked = torch.cat([read(stage[node].parent) for node in piece])
                    output = repeated(*calls, len(piece)).run(block, stacked)
                    for node, part in zip(piece, torch.split(output, len(inputs.ids)), strict=True):
                        write(node, part)

    def leave(self, batch: Batch, inputs: Inputs, read: Read, texts: TextSet, *, together: int) -> BatchScores:
        """Return the scores of a batch in every state, through what follows the last block and the head.

        Args:
            batch: padded rows.
            inputs: those of the batch.
            read: gives the states after the last block.
            texts: for the names of sentences in errors.
            together: how many states the head scores at once. It decides the memory, and the last bits.

        Raises:
            ArtifactError: a state predicts NaN or infinity.
        """
        positions, targets = batch.positions.to(inputs.ids.device), batch.targets.to(inputs.ids.device)
        head, first = self.head, self.tree.leaves[BASELINE]
        reference = self._head_inputs([first], inputs, positions, read)[0]
        baseline = torch.zeros(len(targets), 3, dtype=torch.float64)
        scores: dict[int, Tensor] = {}
        for variant, leaves in self._leaves_by_head().items():
            state_head = self._head_of(variant) if variant else None
            for piece in _pieces(leaves, together):
                hidden = self._head_inputs(piece, inputs, positions, read)
                nll, of_states = score_hidden(reference, hidden, targets, head, state_head=state_head)
                baseline[:, 0] = nll.cpu()
                scores |= dict(zip(piece, of_states.cpu().double(), strict=True))
        # A state that is the 16-bit model itself has no KL; rounding would give it one of about 1e-7.
        scores[first] = baseline
        return {name: sum_rows(batch, scores[leaf], name, texts) for name, leaf in self.tree.leaves.items()}

    def _leaves_by_head(self) -> dict[Variant, list[int]]:
        groups: dict[Variant, list[int]] = {}
        for variant, leaves in self.tree.by_variant(len(self.tree.stages) - 1).items():
            groups.setdefault(tuple(pair for pair in variant if pair[0] == HEAD), []).extend(leaves)
        return groups

    def _head_of(self, variant: Variant) -> Head:
        """Return the head with the weight that a variant gives it."""
        name = f"{self.loaded.family.head}.weight"
        changed = variant_weights(self.bank, variant).get(name)
        return self.head if changed is None else Head(changed, self.head.bias, self.head.rule)

    def _head_inputs(self, leaves: Sequence[int], inputs: Inputs, positions: Tensor, read: Read) -> Tensor:
        """Return what the head is given in some states where a token is predicted, `[states, targets, width]`."""
        last, picked = self.tree.stages[-1], dict[int, Tensor]()
        norms: dict[Variant, list[int]] = {}
        for leaf in leaves:
            norms.setdefault(tuple(pair for pair in last[leaf].variant if pair[0] != HEAD), []).append(leaf)
        for variant, nodes in norms.items():
            with self._weights_of(variant):
                for piece in _stacks(nodes, inputs):
                    stacked = torch.cat([read(last[leaf].parent) for leaf in piece])
                    hidden = head_input(self.loaded, *inputs.copies(len(piece)), stacked)
                    for leaf, part in zip(piece, torch.split(hidden, len(inputs.ids)), strict=True):
                        picked[leaf] = part.flatten(0, 1)[positions]
        return torch.stack([picked[leaf] for leaf in leaves])

    def _weights_of(self, variant: Variant) -> AbstractContextManager[object]:
        return exchanged(self.loaded.model, variant_weights(self.bank, variant))


def _stacks(nodes: Sequence[int], inputs: Inputs) -> Iterator[Sequence[int]]:
    return _pieces(nodes, STACK_TOKENS.on(inputs.ids.device.type) // inputs.ids.numel())


def _pieces(nodes: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (nodes[start : start + max(1, size)] for start in range(0, len(nodes), max(1, size)))


def repeated(once: BlockCall, twice: BlockCall, copies: int) -> BlockCall:
    """Return what a block is called with for `copies` copies of a batch, one after another.

    Which arguments have a batch dimension, and of what multiple (BLOOM's ALiBi has rows times heads), is read off the
    calls for one and for two copies: it is the first dimension of every tensor whose size doubles.

    Raises:
        UnsupportedModelError: a layer is given what earlier ones wrote down.
    """
    check_independent(once)
    positional = tuple(_tile(a, b, copies) for a, b in zip(once.positional, twice.positional, strict=True))
    return BlockCall(positional, {name: _tile(value, twice.named[name], copies) for name, value in once.named.items()})


def _tile(once: Any, twice: Any, copies: int) -> Any:
    if isinstance(once, tuple):
        return tuple(_tile(a, b, copies) for a, b in zip(once, twice, strict=True))
    if not isinstance(once, Tensor) or once.shape == twice.shape or copies == 1:
        return once
    return once.repeat(copies, *[1] * (once.dim() - 1))


def tables_of(loaded: LoadedModel) -> Mapping[str, Table]:
    """Return the parameters that are read from their file row by row; none where the whole model is in memory."""
    return loaded.tables if isinstance(loaded, StreamedModel) else {}
